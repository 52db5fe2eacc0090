"""A new schedule in one file: the cosine of Nichol and Dhariwal (arXiv 2102.09672)."""

import math

import ml_collections
import torch
from torch import Tensor

import solvers
from configs.vp import digits_ddpmpp
from methods.base import Method


def cosine(method: Method, n: int, rho: float) -> Tensor:
    """The noise levels tan(angle) of n + 1 evenly spaced angles."""
    ends = torch.tensor([method.t_prior, method.t_data], dtype=torch.float64)
    first, last = (math.atan(sigma) for sigma in method.sigma(ends).tolist())
    return torch.linspace(first, last, n + 1, dtype=torch.float64).tan()


solvers.SCHEDULES["cosine"] = cosine


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.sampling.ode_solver = "heun"
    config.sampling.schedule = "cosine"
    return config
