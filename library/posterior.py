"""Conditions to draw from: several samples for each, their mean and spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from library.trained_conditions import NO_CONDITION
from reports.images import save_grid
from sources import pairs
from sources.codec import Codec, encoded
from sources.dtypes import tensor_of
from sources.images import Size
from storage.digests import digests
from storage.files import save_npz

DRAWS, ROWS = 6, 12  # draws of a condition, and conditions, in the picture


@dataclass(frozen=True)
class ToDrawFrom:
    """Conditions to draw from: every seed gives one draw for each of them.

    The draw of seed s for condition i of n is file number s n + i. It starts from the noise of seed
    s, so that it equals what `Trained.sample([s], condition=...)` gives.

    Attributes:
        names: of the conditions.
        stored: as stored, (n, H, W, C).
        codec: of the conditions.
    """

    names: tuple[str, ...]
    stored: NDArray
    codec: Codec

    @classmethod
    def from_config(cls, config, sides: Size) -> Self | None:
        """The conditions at `sampling.condition`, with `sides`; None if the network takes none.

        Raises:
            ValueError: a condition is missing or does not fit; `pairs.read_conditions` says which.
            OSError: a file does not exist.
        """
        codec, sampling = pairs.codec_of(config.data, sides), config.sampling
        if sampling.restore and sampling.condition:
            raise ValueError(
                "sampling.restore restores images, sampling.condition draws some: set one"
            )
        if sampling.restore:  # its images bring their conditions
            return None
        if codec is None and sampling.condition:
            raise ValueError(
                f"sampling.condition={sampling.condition}: the network is given no condition "
                "(data.condition_path)"
            )
        if codec is None:
            return None
        if not sampling.condition:
            raise ValueError(NO_CONDITION)
        data, layout = config.data, config.data.layout
        read = pairs.read_conditions(
            "sampling.condition", sampling.condition, codec, data.scale, layout
        )
        return cls(tuple(read), np.stack([*read.values()]), codec)

    @property
    def number(self) -> int:
        """The number of conditions."""
        return len(self.names)

    def numbers(self, seeds: Sequence[int]) -> list[int]:
        """The file numbers of the draws that `seeds` give, for every condition."""
        return [seed * self.number + i for seed in seeds for i in range(self.number)]

    def seeds(self, numbers: Sequence[int]) -> list[int]:
        """The seed of each draw."""
        return [number // self.number for number in numbers]

    def arguments(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments of `Trained.sample` for these draws."""
        stored = tensor_of(self.stored[np.array(numbers) % self.number])
        return {"conditions": {"image": encoded(self.codec, stored)}}

    def origin(self, shape: object = None) -> dict[str, str]:
        """A digest of the conditions, on which samples depend."""
        return digests(conditions=tensor_of(self.stored))

    def save(self, folder: Path, samples: NDArray, codec: Codec) -> Path:
        """Write posterior.npz and posterior.png; the path of the picture.

        The picture has a row for each of the first conditions: the condition, draws, their mean.

        Args:
            samples: (draws * n, H, W, C), in the order of `numbers`.
            codec: of the samples.
        """
        draws = samples.reshape(-1, self.number, *samples.shape[1:]).astype(np.float64)
        mean = draws.mean(0)
        numbers = {"mean": mean, "conditions": self.stored, "names": np.array(self.names)}
        if len(draws) > 1:
            numbers["std"] = draws.std(0, ddof=1)
        save_npz(folder / "posterior.npz", **numbers)
        path = folder / "posterior.png"
        first = draws[:DRAWS, :ROWS].swapaxes(0, 1).astype(samples.dtype)
        pictures = codec.pictures(first.reshape(-1, *samples.shape[1:]))
        pictures = pictures.reshape(len(first), -1, *pictures.shape[1:])
        means = codec.pictures(in_type(mean[:ROWS], samples.dtype))[:, None]
        columns = [condition_pictures(self.stored[:ROWS], self.codec, codec)[:, None]]
        rows = np.concatenate([*columns, pictures, means], 1)
        save_grid(path, rows.reshape(-1, *rows.shape[2:]), rows.shape[1])
        return path


def in_type(mean: NDArray, dtype: np.dtype) -> NDArray:
    """A `mean` of stored data in their type; whole numbers are rounded."""
    return (mean.round() if np.dtype(dtype).kind in "biu" else mean).astype(dtype)


def condition_pictures(stored: NDArray, condition: Codec, image: Codec) -> NDArray[np.uint8]:
    """Pictures (n, H, W, C) of conditions as stored, with as many channels as those of images.

    Conditions in the units of the images are shown in their window, others in a window of their
    own. Of a different number of channels the mean is shown.
    """
    if pairs.is_alike(condition, image):
        return image.pictures(stored)
    pictures, channels = condition.pictures(stored), image.data_shape[0]
    if pictures.shape[3] == channels:
        return pictures
    return in_type(pictures.mean(3, keepdims=True), np.uint8).repeat(channels, 3)
