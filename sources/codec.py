"""Codecs: maps between stored data and the tensors of a method.

Data have units of their own, [0, 1] for images; a codec leads from there to the tensors x of the
method, and back. A further one is a class and a line of `CODECS`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from configs.keys import named, shown
from configs.schema import Flag, Key, OneOf
from sources.images import sides_of

Shape = tuple[int, int, int]


class Codec(Protocol):
    """Between data (B, ...) in their units and x (B, C, H, W), on the device of what it is given.

    One with weights is an `nn.Module`, which `from_config` below moves to the device of the run.

    Attributes:
        keys: the keys that the codec declares, for `configs.default`.
        data_shape: (C, H, W) of the data.
        shape: (C, H, W) of x.
        bounds: range of the entries of x that stand for data; infinite where unknown.
        levels: stored grey levels in a unit of the data.
        log_volume: for each entry, ln of the length in x of a unit of the data.
            Bits/dim are log2(levels) - (ln p(x) / D + log_volume) / ln 2.
        identity: words that are the same for codecs that encode and decode alike, in every process,
            and differ for others: its numbers, and `storage.digests.digest` of its weights.
    """

    keys: ClassVar[Mapping[str, Key]]
    data_shape: Shape
    shape: Shape
    bounds: tuple[float, float]
    levels: int
    log_volume: float
    identity: str

    @classmethod
    def from_config(cls, config) -> Self: ...

    def encode(self, data: Tensor) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor:
        """Data that `x` stands for, clamped to their range."""
        ...

    def unclamped(self, x: Tensor) -> Tensor:
        """The inverse of `encode`, without clamping to the range of the data."""
        ...

    def show(self, x: Tensor) -> Tensor:
        """Pictures of `x`, noisy or not, uint8 (B, C, H, W) on the CPU."""
        ...


@dataclass(frozen=True)
class EightBitImages:
    """Images in [0, 1], stored in 256 grey levels: x is in [-1, 1], or in [0, 1] if not `centered`.

    Attributes:
        data_shape: (C, H, W).
        centered: see above.
    """

    data_shape: Shape
    centered: bool = True

    levels = 256
    keys = {"data.centered": Key(True, Flag(), "the network sees [-1, 1], else [0, 1]")}

    @classmethod
    def from_config(cls, config) -> Self:
        """The codec of `config.data`; ValueError where the shape of the data is not decided yet."""
        data = config.data
        for key in ("num_channels", "image_size"):
            if not data[key]:
                raise ValueError(f"data.{key} is open: training measures it at its first start")
        return cls((data.num_channels, *sides_of(data.image_size)), data.centered)

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
        """Pictures of `x`; a root mean square above that of black and white is scaled down."""
        contrast = 2 * self.unclamped(x) - 1
        rms = contrast.flatten(1).square().mean(1).sqrt().clamp(min=1)
        image = (contrast / rms.view(-1, 1, 1, 1) + 1) / 2
        return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


# data.codec -> the codec.
CODECS: dict[str, type[Codec]] = {"": EightBitImages}

KEYS = {
    "data.codec": Key(
        "",
        OneOf(registry="sources.codec.CODECS"),
        "map between data and the network's x; '': grey levels are scaled",
        of_machine="always",
    )
}


def from_config(config, device: torch.device | str = "cpu") -> Codec:
    """The codec that `config.data.codec` names.

    One that is an `nn.Module` is moved to `device`, and evaluates; its weights are not trained.

    Raises:
        ValueError: it does not fit the data, or has no `identity` to tell its results by.
    """
    codec = named(CODECS, "data.codec", config.data.codec).from_config(config)
    if not isinstance(getattr(codec, "identity", None), str):
        raise ValueError(
            f"data.codec={config.data.codec!r}: {type(codec).__name__} has no `identity`, words "
            "that tell its results from those of other codecs; see docs/extending.md"
        )
    if isinstance(codec, nn.Module):
        codec.to(device).eval().requires_grad_(False)
    return codec


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
