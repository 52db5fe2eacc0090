"""Solvers whose steps are given: one for each pair of neighbouring `levels` (N + 1,)."""

from itertools import pairwise

import torch
from torch import Tensor

from solvers.base import Callback, Slope, Step, check_finite


def euler(slope: Slope, x: Tensor, levels: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method: the state at the last level, from N evaluations."""
    for i, (here, there) in enumerate(pairwise(levels.tolist())):
        d = slope(x, here)
        if callback:
            callback(Step(i, here, x, d))
        x = check_finite(x + (there - here) * d, there)
    return x


def heun(slope: Slope, x: Tensor, levels: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's method of order 2, its last step Euler's: 2 N - 1 evaluations."""
    last = len(levels) - 2
    for i, (here, there) in enumerate(pairwise(levels.tolist())):
        d, h = slope(x, here), there - here
        if callback:
            callback(Step(i, here, x, d))
        change = h * d if i == last else h / 2 * (d + slope(x + h * d, there))
        x = check_finite(x + change, there)
    return x


def multistep(slope: Slope, x: Tensor, levels: Tensor, callback: Callback | None = None) -> Tensor:
    """The method of Adams and Bashforth of order 3, from N evaluations.

    A step integrates the parabola through the last three slopes; the first two make do with fewer.
    In a method's natural variables this is rho-AB DEIS (Zhang and Chen 2023, arXiv 2204.13902).
    """
    slopes, passed = [], []
    for i, (here, there) in enumerate(pairwise(levels.tolist())):
        slopes, passed = [slope(x, here), *slopes][:3], [here, *passed][:3]
        if callback:
            callback(Step(i, here, x, slopes[0]))
        for weight, d in zip(adams_bashforth(passed, there), slopes, strict=True):
            x = x + weight * d
        check_finite(x, there)
    return x


def adams_bashforth(passed: list[float], there: float) -> list[float]:
    """Weights of the slopes at the levels `passed` that integrate from passed[0] to `there`.

    They are exact for powers of s = (level - passed[0]) / step, which a step takes from 0 to 1.
    """
    step = there - passed[0]
    s = (torch.tensor(passed, dtype=torch.float64) - passed[0]) / step
    moments = 1 / torch.arange(1, len(s) + 1, dtype=torch.float64)
    return (step * torch.linalg.solve(torch.vander(s, increasing=True).T, moments)).tolist()
