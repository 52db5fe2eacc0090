"""Solvers and schedules, by name. A further one of either is a file and a line of its table."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from methods.base import Method
from solvers.exponential import dpmpp, unipc
from solvers.fixed_steps import euler, heun, ipndm, linear_multistep, multistep
from solvers.rk45 import rk45
from solvers.schedules import logsnr, polynomial, uniform


class Solver(NamedTuple):
    """A solver of a method's sampling ODE, and the schedule that `sampling.schedule='auto'` means.

    `solve(slope, x, levels, callback=None)` integrates `x` along `levels` and returns the state at
    the last. With a schedule it sees the ODE in natural variables, over the noise level. Without
    one it chooses its steps by the options of `rk45`, and sees the ODE over the method's
    time, with the ends as `levels`.

    One of several `orders` takes the option `order`; one that `churns`, `churn` and `noise` (see
    `solvers.fixed_steps.heun`).
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

# This names one more solver and one more schedule; both are made for a given network. The steps of
# the solver are its option `advance`.
FITTED = "fitted"
_FITTED_STEPS = Solver(linear_multistep, schedule=FITTED, orders=(1, 2, 3, 4))


def solver_named(name: str) -> Solver:
    """The solver that `sampling.ode_solver` means by its `name`."""
    return _FITTED_STEPS if name == FITTED else SOLVERS[name]


# (method, n, rho) -> the n + 1 noise levels (n + 1,), float64.
Schedule = Callable[[Method, int, float], Tensor]

# sampling.schedule -> the schedule.
SCHEDULES: dict[str, Schedule] = {
    "uniform": uniform,
    "polynomial": polynomial,
    "logsnr": logsnr,
}
