"""Checks of what callers of the library pass: images, noise levels, seeds."""

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from configs.keys import shown


def check_shape(x: Tensor, shape: tuple[int, int, int], name: str) -> None:
    """Raise ValueError unless `x` is a tensor (n, *shape)."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1:] != shape:
        form = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor (n, {str(shape)[1:]}, not {form}")


def check_floats(x: Tensor, shape: tuple[int, int, int], name: str) -> None:
    """Raise ValueError unless `x` is a tensor (n, *shape) of floats: bytes are 0 to 255."""
    check_shape(x, shape, name)
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floats, not {x.dtype}; divide bytes by 255")


def checked_levels(
    sigma: float | Sequence[float] | Tensor, n: int, low: float, high: float
) -> Tensor:
    """Noise levels in float64 on the CPU, () or (n,); ValueError unless from `low` to `high`."""
    try:
        levels = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").detach().squeeze()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"sigma must be a number or {n} of them, not {shown(sigma)}") from None
    if levels.shape not in ((), (n,)):
        raise ValueError(f"sigma must be one noise level or {n}, not {levels.numel()}")
    # the ends may be rounded
    wrong = levels[~((levels >= 0.999999 * low) & (levels <= 1.000001 * high))]
    if wrong.numel():
        raise ValueError(
            f"sigma must be a noise level from {low:.6g} to {high:.6g}, not {wrong[0].item()}"
        )
    return levels


def checked_seeds(seeds: Iterable[int]) -> list[int]:
    """The seeds as a list; ValueError unless all are whole numbers from 0 to 2^63 - 1."""
    if not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) == 0:
        raise ValueError(f"seeds must be several whole numbers, as range(5), not {shown(seeds)}")
    return [checked_seed(seed) for seed in seeds]


def checked_seed(seed: int) -> int:
    """The seed as an int; ValueError unless it is a whole number from 0 to 2^63 - 1."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        raise ValueError(f"a seed must be a whole number from 0 to 2^63 - 1, not {shown(seed)}")
    return number
