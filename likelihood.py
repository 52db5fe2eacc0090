"""Likelihood of data under a method's ODE, by the instantaneous change of variables."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from methods import Method, Network
from sampling import rk45


def rademacher(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Signs +1 and -1 of the shape of `x`, each with probability 1/2."""
    signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device, dtype=torch.int8)
    return (2 * signs - 1).to(x.dtype)


def log_likelihood(
    method: Method,
    net: Network,
    x: Tensor,
    probe: Tensor,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> tuple[Tensor, Tensor, int]:
    """Log density of `x` under the law that the sampling ODE carries from the prior to the data.

    log p(x_0) = log p_prior(x_T) + integral of div(dx/dt) dt from data to prior (Chen et al. 2018,
    arXiv 1806.07366), the divergence estimated as probe . d(dx/dt . probe)/dx (Hutchinson;
    Grathwohl et al. 2019, arXiv 1810.01367).

    Args:
        method, net: whose law.
        x: scaled images (B, C, H, W).
        probe: noise of the shape of `x`, of mean 0 and covariance I.
        rtol, atol: see `rk45`.

    Returns:
        log p (B,) in nats, the latent at the prior (B, C, H, W), and the number of evaluations.
    """

    def flow(state: Tensor, t: float) -> Tensor:
        with torch.enable_grad():
            x_t = state[:, :-1].view_as(x).requires_grad_()
            drift = method.ode(net, x_t, t)
            (gradient,) = torch.autograd.grad((drift * probe).sum(), x_t)
        divergence = (gradient * probe).flatten(1).sum(1, keepdim=True)
        return torch.cat([drift.detach().flatten(1), divergence], dim=1)

    with torch.no_grad():
        start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
        end, evaluations = rk45(flow, start, method.t_data, method.t_prior, rtol, atol)
        latent, change = end[:, :-1].view_as(x), end[:, -1]
        return method.prior_logp(latent) + change, latent, evaluations


def get_likelihood_fn(config, method: Method) -> Callable[..., tuple[Tensor, Tensor, int]]:
    """Bits per dimension of images.

    Returns:
        `likelihood_fn(net, data, generator=None)` for scaled, uniformly dequantised `data`
        (B, C, H, W): bits/dim (B,) of the 8-bit images they came from, latents (B, C, H, W) and the
        number of evaluations. `generator` draws the probe.
    """
    # 256 grey levels span the interval that the data scaler maps to: log2(256 / its length).
    offset = 7.0 if config.data.centered else 8.0

    def likelihood_fn(net, data, generator=None):
        probe = rademacher(data, generator)
        log_p, latent, evaluations = log_likelihood(method, net, data, probe)
        bits = -log_p / (data[0].numel() * math.log(2)) + offset
        return bits, latent, evaluations

    return likelihood_fn
