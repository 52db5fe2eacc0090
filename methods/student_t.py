"""The multivariate Student t: the noise of PFGM (D = 1), PFGM++ (any D > 0) and EDM (D = inf).

In N dimensions, with D degrees of freedom and the scale sigma,

    x = sigma e / sqrt(g),    e ~ N(0, I_N),    g ~ Gamma(shape D/2, rate D/2),

and the density of x is proportional to (||x||^2 + D sigma^2)^(-(N + D)/2). For D = inf g is 1 and
x is Gaussian. With r = sigma sqrt(D) this is the kernel of PFGM++ (arXiv 2302.04265, section 3).
"""

import math

import torch
from torch import Tensor


def inverse_root_gamma(
    n: int, D: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws (n,), float64, of 1 / sqrt(g), by which a Student t is wider than a Gaussian.

    Nothing is clipped: at small D a share p of the draws exceeds about p^(-1/D). For D = 0.5, the
    smallest of a config, all are below 1e32, as uniform numbers are multiples of 2^-53: float32
    holds them, but not the squares of those above 1e19, one in some 1e9.
    """
    if math.isinf(D):
        return torch.ones(n, dtype=torch.float64, device=device)
    shape = torch.full((n,), D / 2, dtype=torch.float64, device=device)
    # torch.distributions.Gamma takes no generator, so this is the function below it. On CUDA its
    # smallest draws are float32; here they come from Gamma(a) = Gamma(a + 1) U^(1/a) in float64.
    g = torch._standard_gamma(shape + 1, generator=generator)
    uniform = 1 - torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    return (g * uniform ** (1 / shape) / shape).rsqrt()


def log_density(x: Tensor, sigma: float, D: float) -> Tensor:
    """Log density (B,), in nats, of `x` (B, ...) with N entries each; accurate for every D > 0."""
    dim = x[0].numel()
    squared = (x.double().flatten(1) / sigma).square().sum(1)
    constant = -dim * (0.5 * math.log(2 * math.pi) + math.log(sigma))
    if math.isinf(D):
        return (constant - 0.5 * squared).to(x.dtype)
    constant += log_gamma_ratio(D / 2, dim / 2)
    return (constant - 0.5 * (dim + D) * (squared / D).log1p()).to(x.dtype)


def log_gamma_ratio(a: float, m: float) -> float:
    """log(Gamma(a + m) / (Gamma(a) a^m)) for a, m > 0; it goes to 0 for large a.

    From a = 50 on by Stirling's series, which avoids the difference of large numbers.
    """
    if a < 50:
        return math.lgamma(a + m) - math.lgamma(a) - m * math.log(a)

    def correction(z: float) -> float:  # log Gamma less Stirling's formula, to 1e-15 for z >= 50
        return z**-1 / 12 - z**-3 / 360 + z**-5 / 1260

    return (a + m - 0.5) * math.log1p(m / a) - m + correction(a + m) - correction(a)
