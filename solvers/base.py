"""What all solvers share: their signature, the callback, and the check of their states."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# (x, level) -> dx/dlevel, of the shape of x.
Slope = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """What a callback is given before each step: the state `x` at `level`, and the slope there."""

    index: int
    level: float
    x: Tensor
    slope: Tensor


Callback = Callable[[Step], object]


class Counted:
    """A function that counts its calls: the number of function evaluations of a solver."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.calls = function, 0

    def __call__(self, *inputs, **conditions) -> Tensor:
        self.calls += 1
        return self.function(*inputs, **conditions)


def check_finite(x: Tensor, level: float) -> Tensor:
    """`x`; FloatingPointError where it is not finite after the step to `level`."""
    if not x.isfinite().all():
        raise FloatingPointError(f"the state is not finite after the step to {level:.6g}")
    return x
