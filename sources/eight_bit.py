"""The codec of images of 8 bits: x is in [-1, 1], or in [0, 1]."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import Flag, Key
from sources.images import Shape, shape_of
from sources.measured_arrays import picture_of


class EightBit:
    """Base of codecs of 8-bit images, whose unit is the range from black to white."""

    dtype, precision, levels, windows = "uint8", torch.float32, 256, ()

    @property
    def noise_unit(self) -> float:
        low, high = self.bounds
        return high - low

    def check(self, data: Tensor) -> None:
        if not (data.is_floating_point() and ((data >= 0) & (data <= 1)).all()):
            raise ValueError("images must be floats in [0, 1]; divide 8-bit images by 255")

    def units(self, stored: Tensor) -> Tensor:
        _check_bytes(stored)
        return stored.float().div_(255)  # in place, since new memory takes longer than the division

    def dequantized(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(stored + u) / 256, u uniform in [0, 1)."""
        _check_bytes(stored)
        draw = {"generator": generator, "device": stored.device}
        return torch.rand(stored.shape, **draw).add_(stored).div_(256)

    def stored(self, data: Tensor) -> NDArray[np.uint8]:
        return (data * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def comparable(self, data: Tensor) -> Tensor:
        return data

    def pictures(self, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return stored

    def within_window(self, stored: NDArray[np.uint8]) -> NDArray:
        return stored / 255


def _check_bytes(stored: Tensor) -> None:
    if stored.dtype != torch.uint8:
        raise ValueError(
            f"the data are {str(stored.dtype).removeprefix('torch.')}, and data.dtype is open or "
            "another: training measures it at its first start"
        )


@dataclass(frozen=True)
class EightBitImages(EightBit):
    """Images in [0, 1], stored in 256 grey levels: x is in [-1, 1], or in [0, 1] if not `centered`.

    Attributes:
        data_shape: (C, H, W).
        centered: see above.
    """

    data_shape: Shape
    centered: bool = True

    keys = {"data.centered": Key(True, Flag(), "the network sees [-1, 1], else [0, 1]")}

    @classmethod
    def from_config(cls, config) -> Self:
        """The codec of `config.data`; ValueError where the shape of the data is not decided yet."""
        return cls(shape_of(config.data), config.data.centered)

    @property
    def shape(self) -> Shape:
        return self.data_shape

    @property
    def bounds(self) -> tuple[float, float]:
        return (-1.0, 1.0) if self.centered else (0.0, 1.0)

    @property
    def log_volume(self) -> float:
        low, high = self.bounds
        return math.log(high - low)

    @property
    def identity(self) -> str:
        return repr(self)

    def encode(self, data: Tensor) -> Tensor:
        return 2 * data - 1 if self.centered else data

    def unclamped(self, x: Tensor) -> Tensor:
        return (x + 1) / 2 if self.centered else x

    def decode(self, x: Tensor) -> Tensor:
        return self.unclamped(x).clamp(0, 1)

    def show(self, x: Tensor) -> Tensor:
        return picture_of(2 * self.unclamped(x) - 1)
