"""Schedules: the noise levels of the solvers with fixed steps."""

import torch
from torch import Tensor

from methods.base import Method


def uniform(method: Method, n: int, rho: float) -> Tensor:
    """The n + 1 noise levels, from prior to data, of evenly spaced times; `rho` is not used."""
    return method.sigma(torch.linspace(method.t_prior, method.t_data, n + 1, dtype=torch.float64))


def polynomial(method: Method, n: int, rho: float) -> Tensor:
    """The n + 1 noise levels, from prior to data, whose rho-th roots are evenly spaced.

    Source: Karras et al. 2022 (arXiv 2206.00364), equation 5; the larger rho > 0, the more of them
    are close to the data.
    """
    ends = torch.tensor([method.t_prior, method.t_data], dtype=torch.float64)
    first, last = (method.sigma(ends) ** (1 / rho)).tolist()
    return torch.linspace(first, last, n + 1, dtype=torch.float64) ** rho


def logsnr(method: Method, n: int, rho: float) -> Tensor:
    """The n + 1 noise levels, from prior to data, whose logs are evenly spaced; `rho` is not used.

    log sigma is minus half the log of the signal-to-noise ratio of the data, alpha^2 over the
    variance of the noise in x (Lu et al. 2022, arXiv 2206.00927).
    """
    ends = torch.tensor([method.t_prior, method.t_data], dtype=torch.float64)
    first, last = method.sigma(ends).log().tolist()
    return torch.linspace(first, last, n + 1, dtype=torch.float64).exp()
