"""A new condition in one file: a network is given two numbers with each image, a vector.

The images are stripes, and the numbers say how steep and how dense they are. Training drops the
vector of a share of the examples, so that samples can be guided by it.
"""

import ml_collections
import numpy as np
import torch
from torch import Tensor, nn

import models
import sources
from configs.pfgmpp import digits_ddpmpp
from models.layers import PositionalFeatures

NUMBERS = {"train": 300, "test": 60}
WIDTH = 32


class Stripes:
    """Grey images of the side `size`, and as conditions the vector (2,) that each is made of."""

    def __init__(self, vectors: np.ndarray, size: int):
        self.vectors, self.size = vectors, size

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, i: int) -> np.ndarray:
        rows, columns = np.indices((self.size, self.size))
        wave = np.sin(self.vectors[i, 0] * rows + self.vectors[i, 1] * columns)
        return np.uint8(127.5 * (1 + wave))[..., None]

    def conditions(self) -> dict[str, np.ndarray]:
        return {"vector": self.vectors}


def open_stripes(data, split: str) -> Stripes:
    random = np.random.default_rng(len(split))
    return Stripes(random.normal(size=(NUMBERS[split], 2)).astype(np.float32), data.image_size)


class Conditional(nn.Module):
    """(x (B, C, H, W), noise_label (B,), vector (B, 2)) -> (B, out_channels, H, W)."""

    def __init__(self, shape: tuple[int, int, int], out_channels: int):
        super().__init__()
        channels, self.sides = shape[0], shape[1:]
        self.features = PositionalFeatures(WIDTH)
        self.embedding = nn.Linear(WIDTH + 2, WIDTH)
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.last = nn.Conv2d(WIDTH, out_channels, 3, padding=1)

    @classmethod
    def from_config(cls, config, shape: tuple[int, int, int], out_channels: int) -> "Conditional":
        return cls(shape, out_channels)

    def forward(self, x: Tensor, noise_label: Tensor, vector: Tensor | None = None) -> Tensor:
        if vector is None:  # none, as a dropped one
            vector = x.new_zeros(len(x), 2)
        features = torch.cat([self.features(noise_label), vector], 1)
        h = self.first(x) + self.embedding(features)[:, :, None, None]
        return self.last(nn.functional.silu(h))


sources.SOURCES["conditional_stripes"] = open_stripes
models.NETWORKS["conditional"] = Conditional.from_config


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.data.dataset, config.data.conditions = "conditional_stripes", "vector"
    config.model.name = "conditional"
    config.training.label_dropout = 0.2
    config.sampling.guidance = 2.0
    return config
