"""States of a solution at chosen noise levels, for films."""

from collections.abc import Callable

import torch
from torch import Tensor

from methods.base import Method
from solvers.base import Step


class States:
    """A solver's callback that stores the states of a solution at falling noise `levels` (k,).

    Between two steps y = x / alpha is interpolated linearly in the noise level, as Euler's method
    has it.

    Args:
        method: whose ODE or SDE is solved.
        levels: the noise levels, all above 0.
        timed: the callback gets x and times, not y and noise levels; see `Sampler.tells_times`.
        keep: function of a state y (B, C, H, W), the result of which is stored.
    """

    def __init__(
        self, method: Method, levels: Tensor, timed: bool, keep: Callable[[Tensor], Tensor]
    ):
        self.method, self.levels, self.timed, self.keep = method, levels.tolist(), timed, keep
        self.results: list[Tensor] = []
        self.last: tuple[float, Tensor] | None = None

    def __call__(self, step: Step) -> None:
        level, y = step.level, step.x
        if self.timed:
            t = torch.tensor(level, dtype=torch.float64)
            level, y = self.method.sigma(t).item(), y / self.method.alpha(t).item()
        self._reach(level, y)

    def end(self, x: Tensor) -> Tensor:
        """Stored results (k + 1, B, ...), with one of the solution's end `x` as the last."""
        self._reach(0.0, x)
        return torch.stack([*self.results, self.keep(x)])

    def _reach(self, level: float, y: Tensor) -> None:
        while len(self.results) < len(self.levels) and self.levels[len(self.results)] >= level:
            if self.last is None:
                state = y
            else:
                above, start = self.last
                share = (above - self.levels[len(self.results)]) / (above - level)
                state = start.lerp(y, share)
            self.results.append(self.keep(state))
        self.last = level, y
