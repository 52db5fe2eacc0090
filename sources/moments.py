"""Mean, standard deviation and window of the channels of arrays, measured image by image."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sources.base import Source, Unreadable, spread
from storage.files import LARGEST

PERCENTILES = (0.5, 99.5)  # at which a window begins and ends
LOOKED_AT = 1024  # images, spread evenly, from which the percentiles are taken
VALUES = 2**22  # of these images, at most
NAMED = 4  # channels in a line of the log

Scale = str | tuple[float, ...]  # a value of data.scale


@dataclass(frozen=True)
class Moments:
    """Measured mean, standard deviation and ends of a window of each channel.

    `window` has low and high of each channel in turn, or of all at once. `constant` are the indices
    of channels whose entries are all equal; their deviation is taken to be 1. `is_fixed`: mean
    and deviation follow from a (low, high) of `data.scale`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    window: tuple[float, ...]
    constant: tuple[int, ...] = ()
    is_fixed: bool = False

    @property
    def line(self) -> str:
        """Text for the log."""
        mean, std = _in_words(self.mean), _in_words(self.std)
        text = f"channels have mean {mean}, standard deviation {std}, which become 0 and 0.5"
        if self.is_fixed:
            ends = (self.mean[0] - 2 * self.std[0], self.mean[0] + 2 * self.std[0])
            text = "{:.6g} and {:.6g} become -1 and 1 (data.scale)".format(*ends)
        text += "; pictures show {:.6g} to {:.6g}".format(*self.window)
        text += ", ..." * (len(self.window) > 2)
        if self.constant:
            text += f"; constant, and kept: channel {_in_words(self.constant)}"
        return text


def measure(
    source: Source, scale: Scale = (), watch: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Moments:
    """The moments of the images (H, W, C) of `source`, of which each is read once.

    Args:
        source: images that cannot be read are left out; all others have one shape.
        scale: a value of `data.scale`. () and 'channels' measure each channel by itself, 'all' all
            together; (low, high) becomes -1 and 1.
        watch: shows the progress of a loop over the images, such as `tqdm`.

    Raises ValueError where no image can be read.
    """
    total, lowest, highest, sample = None, np.inf, -np.inf, []
    looked_at = {*spread(len(source), LOOKED_AT)}
    random = np.random.default_rng(0)
    for i in watch(range(len(source))):
        with contextlib.suppress(Unreadable):  # reported when it is decoded
            values = np.asarray(source[i], np.float64)
            values = values.reshape(-1, values.shape[-1])
            part = len(values), values.mean(0), values.var(0) * len(values)
            total = part if total is None else _joined(total, part)
            lowest = np.minimum(lowest, values.min(0))
            highest = np.maximum(highest, values.max(0))
            if i in looked_at:
                most = max(1, VALUES // (len(looked_at) * values.shape[1]))
                rows = random.choice(len(values), min(len(values), most), replace=False)
                sample.append(values[rows])
    if total is None:
        raise ValueError(f"none of {len(source)} images can be read")
    count, mean, squares = total
    constant = lowest == highest
    mean, variance = np.where(constant, lowest, mean), np.where(constant, 0, squares / count)
    if scale == "all":
        variance = (variance + np.square(mean - mean.mean())).mean() + 0 * mean
        mean = mean.mean() + 0 * mean
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    is_fixed = not isinstance(scale, str) and len(scale) > 0
    if is_fixed:
        low, high = scale
        mean, std = (low + high) / 2 + 0 * mean, (high - low) / 4 + 0 * std
    if not ((abs(mean) <= LARGEST) & (std >= 1 / LARGEST) & (std <= LARGEST)).all():
        raise ValueError(f"means and deviations are beyond {LARGEST:g}: store it in other units")
    return Moments(
        tuple(mean.tolist()),
        tuple(std.tolist()),
        _window(np.concatenate(sample), together=scale == "all"),
        tuple(np.flatnonzero(constant).tolist()),
        is_fixed,
    )


def _joined(first: tuple, other: tuple) -> tuple:
    """Number, mean and sum of squared differences of two sets of values (Chan et al. 1979)."""
    (n, mean, squares), (m, other_mean, other_squares) = first, other
    change = other_mean - mean
    return (
        n + m,
        mean + change * m / (n + m),
        squares + other_squares + change**2 * n * m / (n + m),
    )


def _window(values: NDArray, together: bool) -> tuple[float, ...]:
    """Low and high of `values` (k, C) in each channel in turn, or `together`."""
    ends = []
    for channel in [values.ravel()] if together else values.T:
        low, high = np.percentile(channel, PERCENTILES)
        if low == high:
            low, high = channel.min(), channel.max()
        if low == high:
            low, high = low - 1, high + 1
        ends += [float(low), float(high)]
    return tuple(ends)


def _in_words(numbers: Sequence[float]) -> str:
    words = " ".join(f"{number:.6g}" for number in numbers[:NAMED])
    return words + " ..." * (len(numbers) > NAMED)
