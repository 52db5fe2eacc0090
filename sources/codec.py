"""Codecs: maps between stored data and the tensors of a method.

Data have units of their own, [0, 1] for images; a codec maps what is stored to data in their units,
these to the tensors x of the method, and back. A new one is a class and a line of `CODECS`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.keys import named, shown
from configs.schema import Flag, Key, OneOf
from sources import measured_arrays
from sources.images import Shape, shape_of
from sources.measured_arrays import MeasuredArrays, picture_of


class Codec(Protocol):
    """Between stored data, data (B, C, H, W) in their units, and x (B, C, H, W).

    Tensors stay on their device. A codec with weights is an `nn.Module`, which `from_config` below
    moves to the device of the run. `EightBit` has all that concerns stored images of 8 bits.

    Attributes:
        keys: the keys that the codec declares, for `configs.default`.
        data_shape: (C, H, W) of the data.
        shape: (C, H, W) of x.
        dtype: numpy's name of the type in which data are stored.
        precision: type of tensors of data in their units.
        bounds: range of the entries of x that stand for data; infinite where unknown.
        levels: stored grey levels in a unit of the data; None where likelihoods are in nats.
        log_volume: for each entry, ln of the length in x of a unit of the data. Nats of an entry
            are -ln p(x) / D - log_volume, and bits/dim are log2(levels) + nats / ln 2.
        windows: low and high of each channel, which pictures show as black and white; () of 8 bits.
        noise_unit: length in x of the unit in which users state noise: from black to white, or the
            standard deviation of a channel; infinite where x has no such length.
        identity: words that are the same for codecs that encode and decode alike, in every process,
            and differ for others: its numbers, and `storage.digests.digest` of its weights.
    """

    keys: ClassVar[Mapping[str, Key]]
    data_shape: Shape
    shape: Shape
    dtype: str
    precision: torch.dtype
    bounds: tuple[float, float]
    levels: int | None
    log_volume: float
    windows: tuple[tuple[float, float], ...]
    noise_unit: float
    identity: str

    @classmethod
    def from_config(cls, config) -> Self: ...

    def check(self, data: Tensor) -> None:
        """Raise ValueError unless `data` are numbers in the units and the range of the data."""
        ...

    def units(self, stored: Tensor) -> Tensor:
        """Data in their units from stored ones (`sources.dtypes.held`)."""
        ...

    def dequantized(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`units`; whole numbers get uniform noise as wide as the step between them.

        The density of such data bounds the likelihood of the whole numbers (Theis et al. 2016).
        """
        ...

    def stored(self, data: Tensor) -> NDArray:
        """Data (B, C, H, W) in their units as they are stored, (B, H, W, C) of type `dtype`."""
        ...

    def comparable(self, data: Tensor) -> Tensor:
        """`data` with all entries on one scale, so that distances are meaningful."""
        ...

    def encode(self, data: Tensor) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor:
        """Data that `x` stands for, clamped to their range."""
        ...

    def unclamped(self, x: Tensor) -> Tensor:
        """The inverse of `encode`, without clamping to the range of the data."""
        ...

    def pictures(self, stored: NDArray) -> NDArray[np.uint8]:
        """Pictures (n, H, W, C) of stored data (n, H, W, C)."""
        ...

    def within_window(self, stored: NDArray) -> NDArray:
        """Stored data as floats, 0 where their pictures are black and 1 where white."""
        ...

    def show(self, x: Tensor) -> Tensor:
        """Pictures of `x`, noisy or not, uint8 (B, C, H, W) on the CPU; see `picture_of`."""
        ...


class EightBit:
    """Base of codecs of 8-bit images, whose unit is the range from black to white."""

    dtype, precision, levels, windows = "uint8", torch.float32, 256, ()

    @property
    def noise_unit(self) -> float:
        low, high = self.bounds
        return high - low

    def check(self, data: Tensor) -> None:
        if not (data.is_floating_point() and ((data >= 0) & (data <= 1)).all()):
            raise ValueError("images must be floats in [0, 1]; divide those of 8 bits by 255")

    def units(self, stored: Tensor) -> Tensor:
        _check_bytes(stored)
        return stored.float().div_(255)  # in place: fresh memory takes longer than the division

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


# data.codec -> the codec; '' is that of `MeasuredArrays` where data.dtype names a type.
CODECS: dict[str, type[Codec]] = {"": EightBitImages}

KEYS = measured_arrays.KEYS | {
    "data.codec": Key(
        "",
        OneOf(registry="sources.codec.CODECS"),
        "map between data and the network's x; '': grey levels, or the channels of arrays, are "
        "scaled",
        of_machine="always",
    )
}


def class_of(name: str, dtype: str) -> type[Codec]:
    """The codec that `data.codec` and `data.dtype` name."""
    return MeasuredArrays if dtype and not name else named(CODECS, "data.codec", name)


def from_config(config, device: torch.device | str = "cpu") -> Codec:
    """The codec that `config.data` names.

    One that is an `nn.Module` is moved to `device`, and evaluates; its weights are not trained.

    Raises:
        ValueError: it does not fit the data, or has no `identity` to tell its results by.
    """
    codec = class_of(config.data.codec, config.data.dtype).from_config(config)
    if not isinstance(getattr(codec, "identity", None), str):
        raise ValueError(
            f"data.codec={config.data.codec!r}: {type(codec).__name__} has no `identity`, words "
            "that tell its results from those of other codecs; see docs/extending.md"
        )
    if isinstance(codec, nn.Module):
        codec.to(device).eval().requires_grad_(False)
    return codec


def encoded(codec: Codec, stored: Tensor) -> Tensor:
    """x (B, C, H, W) of images as stored."""
    return codec.encode(codec.units(stored))


def check_codec(codec: Codec, checkpoint: dict, path: Path) -> None:
    """Raise ValueError unless `codec` is the one that the network of a checkpoint was trained with.

    It is code and weights outside the run, of which the checkpoint, at `path`, has the identity.
    """
    identity = checkpoint.get("codec", codec.identity)
    if identity != codec.identity:
        raise ValueError(
            f"{path}: the network was trained with the codec {shown(identity)}, not with "
            f"{codec.identity} (data.codec)"
        )
