"""A new codec in one file: latent diffusion with a frozen linear autoencoder.

Squares of 2 x 2 pixels become their first coefficients of the Haar transform: mean, and the
differences of columns, of rows and across. With all four it is exact, with fewer it loses some.
"""

from dataclasses import dataclass

import ml_collections
import torch
from torch import Tensor

from configs.schema import Key, whole
from configs.vp import digits_ddpmpp
from sources import codec
from sources.codec import EightBitImages

HAAR = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


@dataclass(frozen=True)
class LinearAutoencoder(codec.EightBit):
    """Images (C, H, W) in [0, 1], H and W even, to latents (C k, H / 2, W / 2) and back."""

    data_shape: codec.Shape
    coefficients: int = 3

    bounds = (-torch.inf, torch.inf)
    levels, log_volume = 1, 0.0  # bits/dim are those of the latents
    keys = {"data.coefficients": Key(3, whole(1, 4), "LinearAutoencoder: of each square")}

    @classmethod
    def from_config(cls, config):
        return cls(EightBitImages.from_config(config).data_shape, config.data.coefficients)

    @property
    def identity(self) -> str:
        return repr(self)

    @property
    def shape(self) -> codec.Shape:
        channels, height, width = self.data_shape
        return channels * self.coefficients, height // 2, width // 2

    def encode(self, data: Tensor) -> Tensor:
        squares = torch.nn.functional.pixel_unshuffle(2 * data - 1, 2).unflatten(1, (-1, 4))
        return torch.einsum("kp,bcphw->bckhw", self._basis(data), squares).flatten(1, 2)

    def unclamped(self, x: Tensor) -> Tensor:
        latents = x.unflatten(1, (-1, self.coefficients))
        squares = torch.einsum("kp,bckhw->bcphw", self._basis(x), latents).flatten(1, 2)
        return (torch.nn.functional.pixel_shuffle(squares, 2) + 1) / 2

    def decode(self, x: Tensor) -> Tensor:
        return self.unclamped(x).clamp(0, 1)

    def show(self, x: Tensor) -> Tensor:
        return (self.decode(x) * 255).round().to(torch.uint8).cpu()

    def _basis(self, x: Tensor) -> Tensor:
        return HAAR[: self.coefficients].to(x)


codec.CODECS["haar"] = LinearAutoencoder


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.data.codec = "haar"
    config.sampling.ode_solver = "heun"
    return config
