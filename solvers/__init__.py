"""Solvers and schedules, by name. A further one of either is a file and a line of its table."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from methods.base import Method
from solvers.fixed_steps import euler, heun, multistep
from solvers.rk45 import rk45
from solvers.schedules import polynomial, uniform


class Solver(NamedTuple):
    """A solver of a method's sampling ODE, and the schedule that `sampling.schedule='auto'` means.

    `solve(slope, x, levels, callback=None)` integrates `x` along `levels` and returns the state at
    the last. With a schedule it sees the ODE in natural variables, over the noise level. Without
    one it chooses its steps by the options of `rk45`, and sees the ODE over the method's
    time, with the ends as `levels`.
    """

    solve: Callable[..., Tensor]
    schedule: str | None = "polynomial"


# sampling.ode_solver -> the solver.
SOLVERS: dict[str, Solver] = {
    "rk45": Solver(rk45, schedule=None),
    "forward_euler": Solver(euler, schedule="uniform"),
    "improved_euler": Solver(heun, schedule="uniform"),
    "heun": Solver(heun),
    "multistep": Solver(multistep),
}

# sampling.schedule -> (method, n, rho) -> the n + 1 noise levels (n + 1,), float64.
SCHEDULES: dict[str, Callable[[Method, int, float], Tensor]] = {
    "uniform": uniform,
    "polynomial": polynomial,
}
