"""Schedule and solver 'fitted': noise levels and steps made for one network, by its trajectories.

Some samples are solved in many fine steps. Between any two of these levels a single step of Euler's
method has a known error, and dynamic programming finds the n + 1 levels between which the sum of
costs is least (GITS, Chen et al. 2024, arXiv 2405.11326, section 4; the cost is another, see
`step_costs`).

The solver then follows the same samples along these levels. Like a step of Adams and Bashforth,
each of its steps is a weighted sum of the last slopes, and an offset. The weights come from a
linear regression of the fine solutions on the slopes (`fit_step`). The next step is fitted from the
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
    """How many are enough for images of `dim` entries: more entries average over more."""
    return max(LEAST_TRAJECTORIES, min(most, 2**20 // dim))


def at_once(dim: int) -> int:
    """How many of them fit in some hundred MB, states and slopes at every level."""
    return max(2, 2**18 // dim)


def fine_levels(method: Method, n: int, rho: float) -> Tensor:
    """Fine levels of `n` steps, of which the last one begins where the ODE ends; `rho` is not used.

    So a callback, which sees the state before each step, also sees that at the end.
    """
    levels = polynomial(method, n - 1, FINE_RHO)
    return torch.cat([levels, 0.99 * levels[-1:]])


def euler_errors(steps: list[Step]) -> tuple[Tensor, Tensor]:
    """What Euler's method errs by in one step between any two levels of some trajectories.

    Args:
        steps: their states (B, ...) and slopes at K levels, as a callback sees them.

    Returns:
        Sums over the B trajectories, float64, on the CPU. (K, K): at [i, j], i < j, the Euclidean
        distance from where the step leads that starts on the trajectory at level i to where the
        trajectory is at level j; else 0. (K,): the distance from each trajectory to the next one.
    """
    states = torch.stack([step.x.flatten(1) for step in steps])
    errors = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for i, step in enumerate(steps[:-1]):
        lengths = torch.tensor([other.level - step.level for other in steps[i + 1 :]])
        there = states[i] + lengths.to(states)[:, None, None] * step.slope.flatten(1)
        errors[i, i + 1 :] = _total_norm(there - states[i + 1 :])
    return errors, _total_norm(states - states.roll(1, dims=1))


def _total_norm(x: Tensor) -> Tensor:
    return x.norm(dim=2).double().sum(1).cpu()


def step_costs(errors: Tensor, apart: Tensor) -> Tensor:
    """The cost (K, K) of a step between two of K levels, by its error and how far apart states are.

    On its way to the data an error shrinks as the distances between trajectories do: for the flow
    of a Gaussian exactly, else about. Where Euler's step of length h errs by h^2, one of order 3
    errs by h^4, and squares of errors add up: the cost is the fourth power. GITS adds Euler's
    errors themselves, and counts all alike; the last step then comes to be so long that samples
    shrink towards the mean of the data given a noisy image.
    """
    return (errors / _above_zero(apart)) ** 4


def _above_zero(distances: Tensor) -> Tensor:
    """The `distances`, of which none is far below the largest, to divide by."""
    return distances.clamp_min((1e-6 * distances.max()).clamp_min(1e-30))


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
    """What is made for a network: its schedule and, for the solver 'fitted', the steps."""

    schedule: str | Callable[[Method, int, float], Tensor]
    advance: Advance | None = None


def states_at(levels: Tensor, steps: list[Step]) -> list[Tensor]:
    """Where fine trajectories are at some of their `levels` (n,), on the CPU, (B, ...) each.

    At level 0 it is where a step of Euler's method leads from the last level.
    """
    last = steps[-1]
    states = {step.level: step.x for step in steps} | {0.0: last.x - last.level * last.slope}
    return [states[level].cpu() for level in levels.tolist()]


class Fitting:
    """Steps that are fitted as they are taken: an `Advance` that keeps them.

    Args:
        targets: where each step should lead, (B, ...).
    """

    def __init__(self, targets: list[Tensor]):
        self.targets = targets
        self.weights: list[Tensor] = []  # (k,) of each step, newest slope first
        self.offsets: list[Tensor] = []

    def __call__(
        self, x: Tensor, slopes: list[Tensor], passed: list[float], there: float
    ) -> Tensor:
        target = self.targets[len(self.weights)].to(x.device)
        weights, offset = fit_step(x, slopes, target)
        self.weights.append(weights)
        self.offsets.append(offset)
        return combine(x, [*slopes, offset], [*weights.tolist(), 1.0])


def fit_step(x: Tensor, slopes: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """The step from `x` (B, ...) to `target` (B, ...) by the `slopes`, each (B, ...).

    It has the least sum of squared distances to the target, each divided by the squared distance of
    that target from the mean of all, so that those far out do not dominate. Its constraint is that
    the second moment about the mean is that of the target: least squares alone make it too small,
    by as much as they err, and a Frechet distance is sensitive to that. By a Lagrange multiplier
    the constrained minimum lies on the line from the step that leads closest to the mean through
    that of least squares. Where no step has as small a moment, it is the one closest to the mean.

    Returns:
        Weights (k,) of the k slopes, float64, on the CPU, and an offset (...).
    """
    rows = [value.double().flatten(1) for value in (target, x, *slopes)]
    apart = (rows[0] - rows[0].mean(0)).norm(dim=1)
    shares = _above_zero(apart) ** -2
    shares = shares / shares.sum()
    means = [shares @ row for row in rows]
    wanted, moved, *terms = (
        ((row - mean) * shares.sqrt()[:, None]).flatten()
        for row, mean in zip(rows, means, strict=True)
    )
    terms = torch.stack(terms, 1)
    # Normal equations: k <= 4 unknowns. Where slopes are parallel, as for white Gaussian data, many
    # solutions exist and the smallest is taken: rtol counts eigenvalues that come from rounding in
    # float32, some 1e-14 of the largest, as 0.
    right = torch.stack([terms.T @ (wanted - moved), terms.T @ -moved], 1)
    inverse = torch.linalg.pinv(terms.T @ terms, rtol=1e-12, hermitian=True)
    closest, to_mean = (inverse @ right).T
    rest = (moved + terms @ to_mean).square().sum()
    taken = (terms @ (closest - to_mean)).square().sum()
    stretch = ((wanted.square().sum() - rest).clamp_min(0) / taken).sqrt() if taken > 0 else 0.0
    weights = to_mean + stretch * (closest - to_mean)
    offset = means[0] - means[1] - weights @ torch.stack(means[2:])
    return weights.cpu(), offset.to(x.dtype).unflatten(0, x.shape[1:])


def steps_as_kept(levels: Tensor, weights: Tensor, offsets: Tensor) -> Advance:
    """The steps along `levels` (n + 1,): `weights` (n, k) of up to k slopes, `offsets` (n, ...)."""
    rows, order = {level: row for row, level in enumerate(levels[:-1].tolist())}, weights.shape[1]

    def advance(x: Tensor, slopes: list[Tensor], passed: list[float], there: float) -> Tensor:
        row = rows[passed[0]]
        if len(slopes) != min(row + 1, order):
            raise ValueError(
                f"the steps were fitted with order {order}, but the solver uses another"
            )
        used = weights[row, : len(slopes)].tolist()
        return combine(x, [*slopes, offsets[row]], [*used, 1.0])

    return advance
