"""Codecs that add a frozen autoencoder (`data.codec=FILE`) to another codec of the data.

The network sees latents whose channels have mean 0 and standard deviation 0.5. The numbers of this
map are measured on the training split at a run's first start, and are kept as keys of the run's
config, like the numbers of the codec of arrays.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from configs.keys import get
from configs.schema import Key, Number, Numbers
from sources import autoencoder
from sources.autoencoder import Autoencoder
from sources.eight_bit import EightBitImages
from sources.images import Shape
from sources.measured_arrays import MOST_CHANNELS, MeasuredArrays

KEYS = {
    "data.latent_mean": Key(
        (),
        Numbers(Number(-1e30, 1e30), range(MOST_CHANNELS + 1)),
        "of latents (data.codec=FILE): the value in each channel that becomes 0; (): measured",
    ),
    "data.latent_std": Key(
        (),
        Numbers(Number(1e-30, 1e30), range(MOST_CHANNELS + 1)),
        "of latents: the difference in each channel that becomes 0.5; (): measured",
    ),
}

# Keys by which a training step changes images, or gets other images with them.
OF_IMAGES = ("data.patch", "data.uniform_dequantization", "training.augment", "data.condition_path")


def is_file(name: str) -> bool:
    """Whether a value of `data.codec` names files, and not one of `sources.codec.CODECS`."""
    return "." in name or "/" in name


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Mixin for a codec of data: x is the latents to which an autoencoder encodes that codec's x.

    Attributes:
        autoencoder: encodes what the network would see without it.
        latent_mean, latent_std: mean and standard deviation of each channel of its latents; ()
            before they are measured.
    """

    autoencoder: Autoencoder
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    of_data: ClassVar[type]
    bounds, noise_unit = (-math.inf, math.inf), math.inf
    log_volume = None  # the volume of the images that decode from a volume of latents is not known

    @classmethod
    def from_config(cls, config) -> Self:
        """The codec of `config.data`; mean and standard deviation of the latents may still be open.

        Raises ValueError, in one line, where the files are no autoencoder of such data, or where an
        option cannot be combined with one.
        """
        data = config.data
        refused = [key for key in OF_IMAGES if get(config, key)]
        if refused or "image" in data.conditions:
            key = [*refused, "data.conditions='image'"][0]
            raise ValueError(
                f"{key} is for images: with data.codec={data.codec} the network is trained on "
                "latents, which are computed once; leave it out"
            )
        of_data = cls.of_data.from_config(config)
        return cls(
            **vars(of_data),
            autoencoder=autoencoder.read(data.codec, of_data.data_shape),
            latent_mean=tuple(data.latent_mean),
            latent_std=tuple(data.latent_std),
        )

    @property
    def shape(self) -> Shape:
        return self.autoencoder.shape

    @functools.cached_property
    def scale(self) -> MeasuredArrays:
        """Codec between unscaled latents and x; ValueError before its numbers are measured."""
        channels = self.shape[0]
        if not len(self.latent_mean) == len(self.latent_std) == channels:
            raise ValueError(
                f"data.latent_mean and data.latent_std have {len(self.latent_mean)} and "
                f"{len(self.latent_std)} numbers for {channels} channels of latents; training "
                "measures them at its first start where both are ()"
            )
        return MeasuredArrays(self.shape, "float32", self.latent_mean, self.latent_std)

    @property
    def unscaled_identity(self) -> str:
        """Text that is the same for codecs with the same `latents`, whatever their scale."""
        return repr(replace(self, latent_mean=(), latent_std=()))

    def latents(self, data: Tensor) -> Tensor:
        """Latents (B, *shape) of data in their units, before they are scaled."""
        return self.autoencoder.encode(super().encode(data))

    def encode(self, data: Tensor) -> Tensor:
        return self.scale.encode(self.latents(data))

    def unclamped(self, x: Tensor) -> Tensor:
        return super().unclamped(self.autoencoder.decode(self.scale.unclamped(x).float()))


@dataclass(frozen=True)
class LatentImages(Latents, EightBitImages):
    """Codec from images of 8 bits to latents."""

    of_data, keys = EightBitImages, EightBitImages.keys | KEYS


@dataclass(frozen=True)
class LatentArrays(Latents, MeasuredArrays):
    """Codec from arrays in units of their own to latents."""

    of_data, keys = MeasuredArrays, MeasuredArrays.keys | KEYS
