"""Preparation of stored images for a training step: flips, dequantisation, codec, augmentation."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from configs.schema import SHARE, Flag, Key
from sources import augmentation
from sources.batch import Batch
from sources.codec import Codec
from sources.patches import random_cut

KEYS = {
    "data.random_flip": Key(True, Flag(), "half of the training images are mirrored"),
    "data.uniform_dequantization": Key(
        False,
        Flag(),
        "uniform noise is added, as wide as a grey level, or as a unit of arrays of whole numbers",
    ),
    "training.augment": Key(
        0.0,
        SHARE,
        "EDM's augmentation: probability of each transformation but mirroring, which half of the "
        "images are; 0: none; needs model.augment_dim=9 and takes the place of data.random_flip",
    ),
}


def half(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """True, with probability 1/2, for each of `images` (B, ...): (B, 1, 1, 1)."""
    draw = {"generator": generator, "device": images.device}
    return torch.rand(len(images), 1, 1, 1, **draw) < 0.5


def mirrored(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`images` (B, C, H, W), each mirrored left to right with probability 1/2."""
    return flipped(images, half(images, generator))


def flipped(images: Tensor, chosen: Tensor) -> Tensor:
    """`images` (B, C, H, W), those mirrored left to right that are `chosen` (B, 1, 1, 1)."""
    if images.dtype != torch.uint8:
        return torch.where(chosen, images.flip(-1), images)
    mask = chosen.to(torch.uint8).neg()  # 255 or 0
    # the same as `torch.where`, which takes four times as long for bytes on a CPU
    return images.flip(-1).bitwise_xor_(images).bitwise_and_(mask).bitwise_xor_(images)


@dataclass(frozen=True)
class Preparation:
    """Preparation of a batch as stored for a training step; called with it and a generator.

    Attributes:
        codec: what encodes the images; larger ones are cut to its shape, anywhere. Conditions that
            are images are cut and transformed alike.
        flips: half of them are mirrored, unless they are transformed.
        dequantizes: see `Codec.dequantized`.
        augment: probability of the transformations of `sources.augmentation`; 0 for none.
        shared: the transformation is the same for the whole batch.
    """

    codec: Codec
    flips: bool = False
    dequantizes: bool = False
    augment: float = 0.0
    shared: bool = False

    @classmethod
    def from_config(cls, config, codec: Codec, shared: bool) -> Self:
        """The preparation of `config`; ValueError if the network takes no augmentation labels."""
        data, augment = config.data, config.training.augment
        if augment and config.model.augment_dim != augmentation.LABELS:
            raise ValueError(
                f"training.augment={augment} needs model.augment_dim={augmentation.LABELS}, the "
                f"entries of its labels, not {config.model.augment_dim}"
            )
        if augment and codec.shape != codec.data_shape:
            raise ValueError(
                f"training.augment={augment} transforms images, but the network sees latents of "
                f"the shape {codec.shape} (data.codec)"
            )
        if augment and min(codec.shape[1:]) < augmentation.LEAST_SIDE:
            raise ValueError(
                f"training.augment={augment} turns and stretches images whose sides are at least "
                f"{augmentation.LEAST_SIDE}, not {codec.shape[1]} x {codec.shape[2]}"
            )
        flips = data.random_flip and not augment  # the augmentation flips too, and labels it
        return cls(codec, flips, data.uniform_dequantization, augment, shared)

    @property
    def words(self) -> str:
        """Text for the log on the changes of training images."""
        if self.augment:
            return f"transformed at random (training.augment={self.augment:g})"
        return f"{'mirrored at random' if self.flips else 'not mirrored'} (data.random_flip)"

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        codec, sides = self.codec, self.codec.data_shape[1:]
        if batch.images.shape[2:] != sides:
            batch = batch.moved(random_cut(batch.images, sides, generator))
        if self.flips:
            chosen = half(batch.images, generator)
            batch = batch.moved(lambda rows: flipped(rows, chosen))
        images = batch.images
        data = codec.dequantized(images, generator) if self.dequantizes else codec.units(images)
        batch = replace(batch, images=codec.encode(data))
        if not self.augment:
            return batch
        return augmentation.augment(batch, self.augment, self.shared, generator)
