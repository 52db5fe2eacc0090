"""Schedule and solver 'fitted': noise levels and steps made for one network, by its trajectories.

Some samples are solved in many fine steps. These tell the error of a single Euler step between any
two of their levels, and dynamic programming finds the n + 1 levels between which the sum of costs
is least (GITS, Chen et al. 2024, arXiv 2405.11326, section 4; the cost is another, see
`step_costs`).

The solver then follows the same samples along these levels. Each step gives the next state as a
weighted sum of the present state and the last slopes, plus an offset. The weights come from a
linear regression of the fine solutions on these (`fit_step`). The next step is fitted from the
states that this one reaches, so that it can correct its errors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from methods.base import Method
from solvers.base import Step
from solvers.fixed_steps import Advance, combine
from solvers.schedules import polynomial

FINE_STEPS = 60  # of the trajectories: the most that a fitted schedule can have
FINE_RHO = 7.0
MOST_FOR_LEVELS = 256  # trajectories
MOST_FOR_STEPS = 1024  # more, because an offset is a mean error over them
LEAST_TRAJECTORIES = 16


def number_of_trajectories(dim: int, most: int) -> int:
    """Number of trajectories of images of `dim` entries: fewer where each averages over more."""
    return max(LEAST_TRAJECTORIES, min(most, 2**20 // dim))


def at_once(dim: int) -> int:
    """Number of trajectories whose states and slopes at every level fit in some hundred MB."""
    return max(2, 2**18 // dim)


def fine_levels(method: Method, n: int, rho: float) -> Tensor:
    """Fine levels of `n` steps, the last of which begins where the ODE ends; `rho` is not used.

    A callback, which sees the state before each step, then also sees the one at the end.
    """
    levels = polynomial(method, n - 1, FINE_RHO)
    return torch.cat([levels, 0.99 * levels[-1:]])


def euler_errors(steps: list[Step]) -> Tensor:
    """Relative errors of single Euler steps between any two levels, summed over trajectories.

    On its way to the data an error shrinks as a trajectory's distance from the mean of all does:
    for the flow of a white Gaussian exactly, else about. Each error is divided by that distance.

    Args:
        steps: the states (B, ...) and slopes of B >= 2 trajectories at K levels, as a callback sees
            them.

    Returns:
        (K, K), float64, on the CPU. At [i, j], i < j: the distance between the end of one Euler
        step from a trajectory's state at level i and its state at level j, divided by the distance
        of the latter from the mean of the B states there; summed over the B trajectories. Else 0.
    """
    states = torch.stack([step.x.flatten(1) for step in steps])
    apart = _above_zero((states - states.mean(1, keepdim=True)).norm(dim=2))
    errors = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for i, step in enumerate(steps[:-1]):
        lengths = torch.tensor([other.level - step.level for other in steps[i + 1 :]])
        ends = states[i] + lengths.to(states)[:, None, None] * step.slope.flatten(1)
        distances = (ends - states[i + 1 :]).norm(dim=2)
        errors[i, i + 1 :] = (distances.double() / apart[i + 1 :]).sum(1).cpu()
    return errors


def step_costs(errors: Tensor) -> Tensor:
    """Cost (K, K) of a step between any two of K levels: the fourth power of Euler's `errors`.

    Where Euler's step of length h errs by h^2, one of order 3 errs by h^4, and squares of errors
    add up. GITS adds Euler's errors themselves, and does not count that they shrink on the way; its
    last step is so long that samples shrink towards the mean of the data given a noisy image.
    """
    return errors**4


def _above_zero(lengths: Tensor) -> Tensor:
    """The `lengths`, those below 1e-6 of the largest raised to that, to divide by."""
    return lengths.clamp_min((1e-6 * lengths.max()).clamp_min(1e-30))


def schedule(levels: Tensor, cost: Tensor, method: Method, n: int, rho: float) -> Tensor:
    """The n + 1 of the K `levels`, both ends among them, whose steps have the least sum of costs.

    Args:
        levels: (K,), float64, from prior to data.
        cost: (K, K), of a step from one level to another; see `step_costs`.
        method, rho: of every schedule; not used.
        n: steps, from 0 (the first level alone) to K - 1.
    """
    return levels[cheapest_path(cost, n)] if n else levels[:1]


def cheapest_path(cost: Tensor, n: int) -> list[int]:
    """The n + 1 indices 0 < ... < K - 1 between which cost[i, j], (K, K), has the least sum."""
    forward = torch.ones_like(cost, dtype=torch.bool).triu(1)
    cost = cost.masked_fill(~forward, torch.inf)
    least = torch.full_like(cost[0], torch.inf)  # cost of the cheapest path to each index
    least[0] = 0
    origins = []
    for _ in range(n):
        least, origin = (least[:, None] + cost).min(0)
        origins.append(origin.tolist())
    path = [len(cost) - 1]
    for origin in reversed(origins):
        path.append(origin[path[-1]])
    return path[::-1]


# --- steps ----------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """Schedule that is fitted to a network and, for the solver 'fitted', the steps."""

    schedule: str | Callable[[Method, int, float], Tensor]
    advance: Advance | None = None


def states_at(levels: Tensor, steps: list[Step]) -> list[Tensor]:
    """States (B, ...), on the CPU, of fine trajectories at some of their `levels` (n,).

    At level 0 it is the end of an Euler step from the last level.
    """
    last = steps[-1]
    states = {step.level: step.x for step in steps} | {0.0: last.x - last.level * last.slope}
    return [states[level].cpu() for level in levels.tolist()]


class Fitting:
    """Steps that are fitted as they are taken: an `Advance` that keeps them.

    Args:
        targets: the states (B, ...) that each step should reach.
    """

    def __init__(self, targets: list[Tensor]):
        self.targets = targets
        self.weights: list[Tensor] = []  # of each step: see `fit_step`
        self.offsets: list[Tensor] = []

    def __call__(
        self, x: Tensor, slopes: list[Tensor], passed: list[float], next_level: float
    ) -> Tensor:
        target = self.targets[len(self.weights)].to(x.device)
        weights, offset = fit_step(x, slopes, target)
        self.weights.append(weights)
        self.offsets.append(offset)
        return _step(x, slopes, weights, offset)


def _step(x: Tensor, slopes: list[Tensor], weights: Tensor, offset: Tensor) -> Tensor:
    return combine(offset, [x, *slopes], weights.tolist())


def fit_step(x: Tensor, slopes: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the step from `x` (B, ...) to `target` (B, ...) by the `slopes`, each (B, ...).

    Its weights are those of least squares, where each squared distance to the target is divided by
    the squared distance of that target from the mean of all, so that those far out do not dominate.
    Predictions with these weights vary too little about the weighted mean: the weighted second
    moment is too small by exactly the squared error, and a Frechet distance is sensitive to that.
    So all weights are multiplied by the factor that restores it. Of all steps with this moment the
    result is the one that errs least.

    Returns:
        Weights (1 + k,) of the state and the k slopes, float64, on the CPU, and an offset (...).
    """
    rows = [value.double().flatten(1) for value in (target, x, *slopes)]
    apart = (rows[0] - rows[0].mean(0)).norm(dim=1)
    shares = _above_zero(apart) ** -2
    shares = shares / shares.sum()
    means = torch.stack([shares @ row for row in rows])
    deviations, *terms = (
        ((row - mean) * shares.sqrt()[:, None]).flatten()
        for row, mean in zip(rows, means, strict=True)
    )
    terms = torch.stack(terms, 1)
    sizes = _above_zero(terms.norm(dim=0))
    terms = terms / sizes  # the state is larger than a slope by a factor of about the noise level
    # Normal equations of at most 5 unknowns. Where state and slopes are parallel, as for white
    # Gaussian data, many solutions exist and the smallest is taken: to rtol, eigenvalues that come
    # from storing the terms in float32, some 1e-14 of the largest, are 0.
    inverse = torch.linalg.pinv(terms.T @ terms, rtol=1e-12, hermitian=True)
    weights = inverse @ (terms.T @ deviations)
    predicted = (terms @ weights).square().sum()
    weights = weights / sizes
    if predicted > 0:
        weights = weights * (deviations.square().sum() / predicted).sqrt()
    offset = means[0] - weights @ means[1:]
    return weights.cpu(), offset.to(x.dtype).unflatten(0, x.shape[1:])


def stored_steps(levels: Tensor, weights: Tensor, offsets: Tensor) -> Advance:
    """Steps along `levels` (n + 1,) by `weights` (n, 1 + k) and `offsets` (n, ...) of `fit_step`.

    Where fewer than k slopes exist, at the first levels, the last weights are not used.
    """
    rows = {level: row for row, level in enumerate(levels[:-1].tolist())}
    order = weights.shape[1] - 1

    def advance(x: Tensor, slopes: list[Tensor], passed: list[float], next_level: float) -> Tensor:
        row = rows[passed[0]]
        if len(slopes) != min(row + 1, order):
            raise ValueError(
                f"the steps were fitted with order {order}, but the solver uses another"
            )
        return _step(x, slopes, weights[row, : 1 + len(slopes)], offsets[row])

    return advance
