"""Solvers with fixed steps, one for each pair of neighbouring `levels` (N + 1,)."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.base import Callback, Slope, Step


def euler(slope: Slope, x: Tensor, levels: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method: the state at the last level, from N evaluations."""
    for i, (level, next_level) in enumerate(pairwise(levels.tolist())):
        d = slope(x, level)
        if callback:
            callback(Step(i, level, x, d))
        x = x + (next_level - level) * d
    return x


class Churn(NamedTuple):
    """Noise that `heun` adds before a step (Karras et al. 2022, arXiv 2206.00364, algorithm 2).

    Before a step from a noise level between S_min and S_max it is raised by the share S_churn / N,
    at most sqrt(2) - 1, by noise of S_noise times the standard deviation that this takes.
    """

    S_churn: float
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def raised(self, level: float, levels: Tensor) -> float:
        """The level to which noise raises `level` before a step, at most the first of `levels`."""
        if not self.S_min <= level <= self.S_max:
            return level
        share = min(self.S_churn / (len(levels) - 1), math.sqrt(2) - 1)
        return min((1 + share) * level, levels[0].item())


def heun(
    slope: Slope,
    x: Tensor,
    levels: Tensor,
    callback: Callback | None = None,
    *,
    churn: Churn | None = None,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Heun's method of order 2, its last step Euler's: 2 N - 1 evaluations.

    With `churn` it is the stochastic sampler of Karras et al. 2022 (arXiv 2206.00364, algorithm 2)
    and `noise(x)` gives standard normal noise of the shape of `x`; the callback then sees the level
    and the state after the noise.
    """
    last = len(levels) - 2
    for i, (level, next_level) in enumerate(pairwise(levels.tolist())):
        if churn and (raised := churn.raised(level, levels)) > level:
            x = x + churn.S_noise * math.sqrt(raised**2 - level**2) * noise(x)
            level = raised
        d, h = slope(x, level), next_level - level
        if callback:
            callback(Step(i, level, x, d))
        change = h * d if i == last else h / 2 * (d + slope(x + h * d, next_level))
        x = x + change
    return x


# (state, the last slopes and their levels, newest first, the next level) -> the state there.
Advance = Callable[[Tensor, list[Tensor], list[float], float], Tensor]


def multistep(
    slope: Slope, x: Tensor, levels: Tensor, callback: Callback | None = None, *, order: int = 3
) -> Tensor:
    """Adams-Bashforth of an `order` from 1 to 4, from N evaluations.

    A step integrates the polynomial through the last `order` slopes; the first steps make do with
    fewer. In a method's natural variables this is rho-AB DEIS (Zhang and Chen 2023, arXiv
    2204.13902).
    """
    advance = _with_weights(adams_bashforth)
    return linear_multistep(slope, x, levels, callback, order=order, advance=advance)


def ipndm(
    slope: Slope, x: Tensor, levels: Tensor, callback: Callback | None = None, *, order: int = 3
) -> Tensor:
    """iPNDM of an `order` from 1 to 4 (Zhang and Chen 2023, arXiv 2204.13902): N evaluations.

    The weights are Adams-Bashforth's for even steps, whatever the steps are, which keeps them small
    where steps shrink fast. The error falls with the power `order` of the step where levels are
    even, else with its square at most.
    """
    advance = _with_weights(even_adams_bashforth)
    return linear_multistep(slope, x, levels, callback, order=order, advance=advance)


def _with_weights(weights: Callable[[list[float], float], list[float]]) -> Advance:
    return lambda x, slopes, passed, next_level: combine(x, slopes, weights(passed, next_level))


def linear_multistep(
    slope: Slope,
    x: Tensor,
    levels: Tensor,
    callback: Callback | None = None,
    *,
    order: int = 3,
    advance: Advance,
    term: Callable[[Tensor, float, Tensor], Tensor] = lambda x, level, slope: slope,
) -> Tensor:
    """A method whose steps, by `advance`, use the last `order` slopes: N evaluations.

    Another `term`, a function of state, level and slope, stands for the slopes in `advance`.
    """
    terms, passed = [], []
    for i, (level, next_level) in enumerate(pairwise(levels.tolist())):
        d = slope(x, level)
        if callback:
            callback(Step(i, level, x, d))
        terms.insert(0, term(x, level, d))
        passed.insert(0, level)
        x = advance(x, terms, passed, next_level)
        del d, terms[order - 1 :], passed[order - 1 :]  # before memory goes to the network
    return x


def adams_bashforth(passed: list[float], next_level: float) -> list[float]:
    """Weights of the slopes at the levels `passed` that integrate from passed[0] to `next_level`.

    They are exact for powers of s = (level - passed[0]) / step, which a step takes from 0 to 1.
    """
    step = next_level - passed[0]
    s = [(level - passed[0]) / step for level in passed]
    return interpolating_weights(s, [step / (k + 1) for k in range(len(s))])


# Number of slopes -> weight of the last one, the one before it and so on, in units of the step.
_EVEN = {
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def even_adams_bashforth(passed: list[float], next_level: float) -> list[float]:
    """The weights of `adams_bashforth` where the levels are even."""
    return [(next_level - passed[0]) * weight for weight in _EVEN[len(passed)]]


def interpolating_weights(nodes: list[float], moments: list[float]) -> list[float]:
    """The w_j with sum_j w_j s_j^k = moments[k], for as many powers k as there are `nodes` s_j."""
    powers = torch.vander(torch.tensor(nodes, dtype=torch.float64), increasing=True).T
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()


def combine(x: Tensor, terms: list[Tensor], weights: list[float]) -> Tensor:
    """The sum of `x` and the `terms` times their `weights`."""
    for term, weight in zip(terms, weights, strict=True):
        x = x + weight * term
    return x
