"""Codecs: maps between stored data and the tensors of a method.

Data have units of their own, [0, 1] for images; a codec maps what is stored to data in their units,
these to the tensors x of the method, and back. A new one is a class and a line of `CODECS`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.keys import named, shown
from configs.schema import Either, Key, OneOf, Text
from sources import latents, measured_arrays
from sources.eight_bit import EightBit, EightBitImages
from sources.images import Shape
from sources.latents import LatentArrays, LatentImages
from sources.measured_arrays import MeasuredArrays

__all__ = ["CODECS", "Codec", "EightBit", "EightBitImages", "MeasuredArrays", "Shape"]


class Codec(Protocol):
    """Map between stored data, data (B, C, H, W) in their units, and x (B, C, H, W).

    Tensors stay on their device. A codec with weights is an `nn.Module`, which `from_config` below
    moves to the device of the run. `EightBit` is the base of codecs of stored 8-bit images.

    Attributes:
        keys: the keys that the codec declares, for `configs.default`.
        data_shape: (C, H, W) of the data.
        shape: (C, H, W) of x.
        dtype: numpy's name of the type in which data are stored.
        precision: type of tensors of data in their units.
        bounds: range of the entries of x that stand for data; infinite where unknown.
        levels: number of stored grey levels in a unit of the data; None where likelihoods are in
            nats.
        log_volume: for each entry, ln of the length in x of a unit of the data. Nats of an entry
            are -ln p(x) / D - log_volume, and bits/dim are log2(levels) + nats / ln 2. None where
            it is not known, so that there are no likelihoods.
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
    log_volume: float | None
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


# data.codec -> the codec; '' is that of `MeasuredArrays` where data.dtype names a type.
CODECS: dict[str, type[Codec]] = {"": EightBitImages}

KEYS = measured_arrays.KEYS | {
    "data.codec": Key(
        "",
        Either(
            OneOf(registry="sources.codec.CODECS"),
            Text(
                r"[^\0\n]*[./][^\0\n]*",
                "a file with a . or / in its name, or two with a comma between them",
            ),
        ),
        "map between data and the network's x; '': grey levels, or the channels of arrays, are "
        "scaled; files: a frozen autoencoder (docs/data.md)",
        of_machine="always",
    )
}
KEYS |= latents.KEYS


def class_of(name: str, dtype: str) -> type[Codec]:
    """The codec that `data.codec` and `data.dtype` name."""
    if latents.is_file(name):
        return LatentArrays if dtype else LatentImages
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


def has_pixels(codec: Codec) -> bool:
    """Whether x is the data on another scale, entry by entry, and not latents."""
    return codec.shape == codec.data_shape and math.isfinite(codec.noise_unit)


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
