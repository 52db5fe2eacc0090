"""Parts of all solvers: signature, callback, count of evaluations, and the check of states."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# (x, level) -> dx/dlevel, of the shape of x.
Slope = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """State `x` at `level` before a step, and the slope there: the argument of a callback."""

    index: int
    level: float
    x: Tensor
    slope: Tensor


Callback = Callable[[Step], object]

# (evaluations so far, noise level), before each evaluation. What it raises ends the solver.
Watch = Callable[[int, float], object]


class TooManyEvaluations(FloatingPointError):
    """A solver that chooses its steps is not at the end after as many as it may take."""


class FiniteStates:
    """Record, on the device, of whether states are finite; the host reads it once, at the end."""

    def __init__(self):
        self.levels: list[float | Tensor] = []
        self.finite: list[Tensor] = []

    def note(self, x: Tensor, level: float | Tensor) -> None:
        """Record the state `x` after the step to `level`."""
        self.levels.append(level)
        self.finite.append(x.isfinite().all())

    def check(self) -> None:
        """Raise FloatingPointError, which names the first level, where a state was not finite."""
        finite = torch.stack(self.finite).tolist()
        if not all(finite):
            level = self.levels[finite.index(False)]
            raise FloatingPointError(f"the state is not finite after the step to {level:.6g}")


class Counted:
    """A slope that counts its calls, the number of function evaluations of a solver.

    Args:
        function: the slope, of x and the level.
        watch: see `Watch`.
        states: records whether each x is finite.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        watch: Watch | None = None,
        states: FiniteStates | None = None,
    ):
        self.function, self.watch, self.states, self.calls = function, watch, states, 0

    def __call__(self, x: Tensor, level: float | Tensor) -> Tensor:
        if self.states:
            self.states.note(x, level)
        if self.watch:
            self.watch(self.calls, level)
        self.calls += 1
        return self.function(x, level)
