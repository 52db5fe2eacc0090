"""A new data source in one file: stripes of random direction, drawn from the image's number."""

import ml_collections
import numpy as np

import sources
from configs.vp import digits_ddpmpp


class Stripes:
    """`n` grey images of the side `size`; those of different `first` are different ones."""

    def __init__(self, n: int, size: int, first: int):
        self.n, self.size, self.first = n, size, first

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> np.ndarray:
        slope = np.random.default_rng(self.first + i).normal(size=2)
        rows, columns = np.indices((self.size, self.size))
        wave = np.sin(slope[0] * rows + slope[1] * columns)
        return np.uint8(127.5 * (1 + wave))[..., None]


def open_stripes(data, split: str) -> Stripes:
    return Stripes(*((300, data.image_size, 0) if split == "train" else (60, data.image_size, 300)))


sources.SOURCES["stripes"] = open_stripes


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.data.dataset = "stripes"
    return config
