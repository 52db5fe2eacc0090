"""The codec of arrays in units of their own: each channel is brought to mean 0 and deviation 0.5.

The numbers of this map are measured on the training split at a run's first start
(`sources.moments`), and are keys of the config that the run keeps, so that it is built without the
data.
"""

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import REFERENCE_STD, Key, Number, Numbers, OneOf, Text
from sources.dtypes import DTYPES, is_whole, limits
from sources.images import Shape, shape_of

SHOWN = 2.5  # deviations around the mean that pictures show where no window is measured
MOST_CHANNELS = 1024

_NUMBER = Number(-1e30, 1e30)

KEYS = {
    "data.dtype": Key(
        "",
        OneOf(("", *DTYPES)),
        "type of arrays in units of their own, and of their samples; image files are read as such "
        "arrays where it is set: as 'uint16' or, of TIFF, 'float32'; '': the type of an array's "
        "file, else images of 8 bits",
    ),
    "data.mean": Key(
        (),
        Numbers(_NUMBER, range(MOST_CHANNELS + 1)),
        "of such arrays: the number of each channel that becomes 0; (): measured, see data.scale",
    ),
    "data.std": Key(
        (),
        Numbers(Number(1e-30, 1e30), range(MOST_CHANNELS + 1)),
        "of such arrays: the difference in each channel that becomes 0.5; (): measured",
    ),
    "reports.window": Key(
        (),
        Numbers(_NUMBER, range(0, 2 * MOST_CHANNELS + 1, 2)),
        "of arrays in units of their own: the numbers (low, high) that are black and white in "
        "pictures, or two for each channel; (): measured, the 0.5 and 99.5 percentiles",
    ),
    "reports.unit": Key(
        "",
        Text(r"[^\0\n]{,40}", "a few letters"),
        "of arrays in units of their own: the name of the unit",
    ),
}


def picture_of(contrast: Tensor) -> Tensor:
    """Pictures, uint8 (B, C, H, W) on the CPU, of images from -1, black, to 1, white.

    A root mean square above that of black and white is scaled down.
    """
    rms = contrast.flatten(1).square().mean(1).sqrt().clamp(min=1)
    image = (contrast / rms.view(-1, 1, 1, 1) + 1) / 2
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@dataclass(frozen=True)
class MeasuredArrays:
    """Arrays of any type of numbers: x = (data - mean) * 0.5 / std in each channel.

    Attributes:
        data_shape: (C, H, W).
        dtype: name of the type in which they are stored, one of `sources.dtypes.DTYPES`.
        mean, std: of each channel.
        window: low and high, or two for each channel, which pictures show as black and white.
    """

    data_shape: Shape
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    window: tuple[float, ...] = field(default=(), repr=False, compare=False)

    bounds = (-math.inf, math.inf)
    levels = None
    noise_unit = REFERENCE_STD
    precision = torch.float64
    keys = KEYS

    def __post_init__(self):
        channels = self.data_shape[0]
        for key, value in (("data.mean", self.mean), ("data.std", self.std)):
            if len(value) != channels:
                raise ValueError(f"{key} has {len(value)} numbers for {channels} channels")
        if len(self.window) not in (0, 2, 2 * channels):
            raise ValueError(
                f"reports.window has {len(self.window)} numbers: it takes low and high, once or "
                f"for each of {channels} channels"
            )
        if not all(low < high for low, high in self.windows):
            raise ValueError(f"reports.window={self.window}: each low must be below its high")

    @classmethod
    def from_config(cls, config) -> Self:
        """The codec of `config.data`; ValueError where its numbers are not decided yet."""
        data, shape = config.data, shape_of(config.data)
        for key in ("mean", "std"):
            if not data[key]:
                raise ValueError(f"data.{key} is open: training measures it at its first start")
        window = tuple(config.reports.window)
        return cls(shape, data.dtype, tuple(data.mean), tuple(data.std), window)

    @property
    def shape(self) -> Shape:
        return self.data_shape

    @property
    def log_volume(self) -> float:
        return math.fsum(math.log(REFERENCE_STD / std) for std in self.std) / len(self.std)

    @property
    def identity(self) -> str:
        return repr(self)

    # --- stored numbers and units ---

    def check(self, data: Tensor) -> None:
        if not data.isfinite().all():
            raise ValueError("arrays must be finite")

    def units(self, stored: Tensor) -> Tensor:
        return stored.double()

    def dequantized(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Whole numbers with uniform noise of [-0.5, 0.5), which rounding takes away again."""
        data = stored.double()
        if not is_whole(self.dtype):
            return data
        draw = {"generator": generator, "device": data.device, "dtype": data.dtype}
        return data + (torch.rand(data.shape, **draw) - 0.5)

    def stored(self, data: Tensor) -> NDArray:
        numbers = data.round() if is_whole(self.dtype) else data
        numbers = numbers.double().clamp(*limits(self.dtype))
        return numbers.permute(0, 2, 3, 1).cpu().numpy().astype(self.dtype)

    def comparable(self, data: Tensor) -> Tensor:
        """Each channel with mean 0 and standard deviation 0.5, so that none drowns the others."""
        mean, std = self._of_channels(self.mean, data), self._of_channels(self.std, data)
        return ((data.double() - mean) * (REFERENCE_STD / std)).float()

    # --- data and x ---

    def encode(self, data: Tensor) -> Tensor:
        return self.comparable(data)

    def unclamped(self, x: Tensor) -> Tensor:
        mean, std = self._of_channels(self.mean, x), self._of_channels(self.std, x)
        return x.double() * (std / REFERENCE_STD) + mean

    def decode(self, x: Tensor) -> Tensor:
        data = self.unclamped(x)
        return data.clamp(*limits(self.dtype)) if is_whole(self.dtype) else data

    # --- pictures ---

    def pictures(self, stored: NDArray) -> NDArray[np.uint8]:
        return (self.within_window(stored).clip(0, 1) * 255).round().astype(np.uint8)

    def within_window(self, stored: NDArray) -> NDArray:
        low, high = np.transpose(self.windows)
        return (stored.astype(np.float64) - low) / (high - low)

    def show(self, x: Tensor) -> Tensor:
        low, high = (self._of_channels(ends, x) for ends in zip(*self.windows, strict=True))
        return picture_of(2 * (self.unclamped(x) - low) / (high - low) - 1)

    @property
    def windows(self) -> tuple[tuple[float, float], ...]:
        if not self.window:
            pairs = zip(self.mean, self.std, strict=True)
            return tuple((mean - SHOWN * std, mean + SHOWN * std) for mean, std in pairs)
        windows = tuple(zip(self.window[::2], self.window[1::2], strict=True))
        return windows * (self.data_shape[0] // len(windows))

    def _of_channels(self, numbers, x: Tensor) -> Tensor:
        """`numbers`, one of each channel, so that they multiply `x` (B, C, H, W)."""
        return torch.as_tensor(numbers, dtype=torch.float64, device=x.device).view(-1, 1, 1)
