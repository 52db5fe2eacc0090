"""Solvers and schedules, by name. A further one is a file and a line of its table."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from methods.base import Method
from solvers.exponential import dpmpp, unipc
from solvers.fixed_steps import euler, heun, ipndm, linear_multistep, multistep
from solvers.rk45 import rk45
from solvers.schedules import logsnr, polynomial, uniform


class Solver(NamedTuple):
    """A solver of a method's sampling ODE.

    `solve(slope, x, levels, callback=None)` integrates `x` along `levels` and returns the state at
    the last. The ODE is that of natural variables over the noise level; a solver without a schedule
    chooses its steps by the options of `rk45`, over the method's time, with both ends as `levels`.

    Attributes:
        schedule: the schedule that `sampling.schedule='auto'` means; None: it chooses its steps.
        orders: values of its option `order`, where it has several.
        churns: it has the options `churn` and `noise` of `solvers.fixed_steps.heun`.
    """

    solve: Callable[..., Tensor]
    schedule: str | None = "polynomial"
    orders: Sequence[int] = ()
    churns: bool = False


# sampling.ode_solver -> the solver.
SOLVERS: dict[str, Solver] = {
    "rk45": Solver(rk45, schedule=None),
    "forward_euler": Solver(euler, schedule="uniform"),
    "improved_euler": Solver(heun, schedule="uniform", churns=True),
    "heun": Solver(heun, churns=True),
    "multistep": Solver(multistep, orders=(1, 2, 3, 4)),
    "ipndm": Solver(ipndm, orders=(1, 2, 3, 4)),
    "dpmpp": Solver(dpmpp, orders=(1, 2, 3)),
    "unipc": Solver(unipc, orders=(1, 2, 3)),
}

# Name of one more solver and one more schedule, which are made for a network. The steps of the
# solver are its option `advance`.
FITTED = "fitted"
_FITTED_STEPS = Solver(linear_multistep, schedule=FITTED, orders=(1, 2, 3, 4))


def solver_named(name: str) -> Solver:
    """The solver `name`, a value of `sampling.ode_solver`."""
    return _FITTED_STEPS if name == FITTED else SOLVERS[name]


# (method, n, rho) -> the n + 1 noise levels (n + 1,), float64.
Schedule = Callable[[Method, int, float], Tensor]

# sampling.schedule -> the schedule.
SCHEDULES: dict[str, Schedule] = {
    "uniform": uniform,
    "polynomial": polynomial,
    "logsnr": logsnr,
}
