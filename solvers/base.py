"""Common parts of all solvers: signature, callback, and the check of states."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# (x, level) -> dx/dlevel, of the shape of x.
Slope = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """Argument of a callback before each step: the state `x` at `level`, and the slope there."""

    index: int
    level: float
    x: Tensor
    slope: Tensor


Callback = Callable[[Step], object]

# (evaluations so far, noise level), before each evaluation. What it raises ends the solver.
Watch = Callable[[int, float], object]


class TooManyEvaluations(FloatingPointError):
    """A solver that chooses its own steps is not at the end after as many as it may take."""


class FiniteStates:
    """Notes on their device whether states are finite; the host asks once, so no step waits."""

    def __init__(self):
        self.levels: list[float | Tensor] = []
        self.finite: list[Tensor] = []

    def note(self, x: Tensor, level: float | Tensor) -> None:
        """The state `x`, after the step to `level`."""
        self.levels.append(level)
        self.finite.append(x.isfinite().all())

    def check(self) -> None:
        """Raises FloatingPointError where a state was not finite, and names the first."""
        finite = torch.stack(self.finite).tolist()
        if not all(finite):
            level = self.levels[finite.index(False)]
            raise FloatingPointError(f"the state is not finite after the step to {level:.6g}")


class Counted:
    """A slope that counts its calls: the number of function evaluations of a solver.

    Args:
        function: the slope, of x and the level.
        watch: called with the number of calls so far and the level, before each call.
        states: records whether each x is finite.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        watch: Callable[[int, float], object] | None = None,
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
