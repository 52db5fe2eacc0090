"""The multivariate Student t, the kernel of PFGM (D = 1), PFGM++ (D > 0) and EDM (D = inf).

With D degrees of freedom and scale sigma it is the law of sigma e / sqrt(g), e ~ N(0, I_N) and
g ~ Gamma(D/2, rate D/2), of density proportional to (||x||^2 + D sigma^2)^(-(N+D)/2).
"""

import math

import torch
from torch import Tensor


def inverse_root_gamma(
    n: int, D: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """1 / sqrt(g) for n draws of g ~ Gamma(D/2, rate D/2), float64 (n,); ones for D = inf.

    It is the factor by which a Student t is wider than a Gaussian. Nothing is clipped: at small D
    a share p of the draws exceeds about p^(-1/D). Since uniform numbers are multiples of 2^-53,
    D = 0.5 stays below 1e32, a float32; its square is none beyond 1e19, one of some 1e9 draws.
    """
    if math.isinf(D):
        return torch.ones(n, dtype=torch.float64, device=device)
    shape = torch.full((n,), D / 2, dtype=torch.float64, device=device)
    # What torch.distributions.Gamma draws with, which takes no generator itself. On CUDA its tail
    # at 0 is that of float32 numbers, so that tail comes from Gamma(a) = Gamma(a + 1) U^(1/a).
    g = torch._standard_gamma(shape + 1, generator=generator)
    uniform = 1 - torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    return (g * uniform ** (1 / shape) / shape).rsqrt()


def log_density(x: Tensor, sigma: float, D: float) -> Tensor:
    """Log density (B,), in nats, of `x` (B, ...) with N entries each; accurate for every D."""
    dim = x[0].numel()
    squared = (x.double().flatten(1) / sigma).square().sum(1)
    constant = -0.5 * dim * math.log(2 * math.pi) - dim * math.log(sigma)
    if math.isinf(D):
        return (constant - 0.5 * squared).to(x.dtype)
    constant += log_gamma_ratio(D / 2, dim / 2)
    return (constant - 0.5 * (dim + D) * (squared / D).log1p()).to(x.dtype)


def log_gamma_ratio(a: float, m: float) -> float:
    """log(Gamma(a + m) / (Gamma(a) a^m)) for a, m > 0, which goes to 0 for large a.

    There Stirling's series avoids the difference of large numbers.
    """
    if a < 50:
        return math.lgamma(a + m) - math.lgamma(a) - m * math.log(a)

    def rest(z: float) -> float:  # of Stirling's series, to 1e-15 from z = 50 on
        return z**-1 / 12 - z**-3 / 360 + z**-5 / 1260

    return (a + m - 0.5) * math.log1p(m / a) - m + rest(a + m) - rest(a)
