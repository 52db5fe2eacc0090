"""Exact field lines of points in the plane, and where they lie when seen from the side."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from methods.field import posterior_mean
from solvers.base import Slope
from solvers.fixed_steps import heun

AZIMUTH, ELEVATION = math.radians(-28), math.radians(24)  # from where the space (x, z) is seen

Points = NDArray[np.float64]  # (..., 2) in the plane, (..., 3) in the space


def exact_slope(data: Tensor, D: float) -> Slope:
    """dy/dsigma (B, C, H, W) where the data are exactly the points `data` (n, C, H, W).

    It is (y - E[data | y]) / sigma for every method; `D` are the degrees of freedom of its noise,
    and levels one for all or one each, (B,).
    """

    def slope(y: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=y.dtype).expand(len(y))
        return (y - posterior_mean(y, data, sigma, D)) / sigma.view(-1, 1, 1, 1)

    return slope


def trajectory(slope: Slope, y: Tensor, levels: Tensor) -> Points:
    """The states (N + 1, B, 2) of points `y` (B, 2, 1, 1) at noise `levels` (N + 1,)."""
    states = []
    end = heun(slope, y, levels, lambda step: states.append(step.x))
    return torch.stack([*states, end]).flatten(2).double().numpy()


def field_lines(data: Tensor, number: int, far: float, steps: int = 60) -> Points:
    """Lines of the Poisson field of `data` (n, 2, 1, 1), from a hemisphere of radius `far` down.

    Each starts in the middle of an equal share of the hemisphere, so that each carries the same
    flux. Returns points (x, z) along each, (steps + 1, number, 3); they end at a thousandth of the
    height they start from.
    """
    k = torch.arange(number, dtype=torch.float64) + 0.5
    height, angle = k / number, math.pi * (1 + math.sqrt(5)) * k  # Fibonacci's lattice
    width = (1 - height**2).sqrt()
    start = far * torch.stack([width * angle.cos(), width * angle.sin()], 1)
    slope, z = exact_slope(data.double(), 1.0), far * height

    def down(x: Tensor, share: float) -> Tensor:  # all lines together: dx/dlog(share) = z dx/dz
        at = z * math.exp(share)
        return at.view(-1, 1, 1, 1) * slope(x, at)

    shares = torch.linspace(0, math.log(1e-3), steps + 1, dtype=torch.float64)
    x = trajectory(down, start.view(-1, 2, 1, 1), shares)
    return np.concatenate([x, (shares.exp()[:, None] * z)[..., None].numpy()], 2)


def in_space(points: Points) -> Points:
    """Places on paper of points (x, z), (..., 3), in a parallel projection from obliquely above."""
    a, b, z = np.moveaxis(points, -1, 0)
    across = math.cos(AZIMUTH) * a + math.sin(AZIMUTH) * b
    depth = depth_of(points)
    return np.stack([across, math.sin(ELEVATION) * depth + math.cos(ELEVATION) * z], -1)


def depth_of(points: Points) -> NDArray[np.float64]:
    """Distances behind the middle of points (x, z), (..., 3), seen from the side."""
    return math.cos(AZIMUTH) * points[..., 1] - math.sin(AZIMUTH) * points[..., 0]
