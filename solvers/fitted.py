"""The schedule 'fitted': noise levels chosen for one network, by how its trajectories bend.

Source: GITS (Chen et al. 2024, arXiv 2405.11326), section 4. Some samples are solved in many fine
steps. Between any two of these levels a single step of Euler's method has a known error, and
dynamic programming finds the n + 1 levels between which the errors have the least sum.
"""

import torch
from torch import Tensor

from methods.base import Method
from solvers.base import Step
from solvers.schedules import polynomial

FINE_STEPS = 60  # of the trajectories: the most that a fitted schedule can have
FINE_RHO = 7.0
MOST_TRAJECTORIES = 256
LEAST_TRAJECTORIES = 16


def number_of_trajectories(dim: int) -> int:
    """How many are enough for images of `dim` entries: more entries average over more."""
    return max(LEAST_TRAJECTORIES, min(MOST_TRAJECTORIES, 2**20 // dim))


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
    of a Gaussian exactly, else about. GITS counts all errors alike.
    """
    return errors / apart.clamp_min(1e-6 * apart.max())


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
