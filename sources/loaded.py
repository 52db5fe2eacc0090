"""Data that are read whole: those of CIFAR and MNIST in the files of their authors."""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from sources import digests
from sources.base import Classes, View
from sources.files import Measured
from sources.images import cropped_then_resized, to_size
from sources.splits import held_out


class Part(NamedTuple):
    """Images uint8 (n, H, W, C), and their class labels (n,), if they have any."""

    images: NDArray[np.uint8]
    labels: NDArray[np.integer] | None


class Loaded:
    """The images at `path`, for either split.

    Args:
        path: for messages.
        read: functions that read "train" and "test", or "" where there are no splits.
        names: reads the names of the classes.

    Attributes:
        split_names: words for the splits; {} without any.
    """

    omitted, by_name = "", False

    def __init__(
        self,
        path: Path,
        read: Mapping[str, Callable[[], Part]],
        names: Callable[[], tuple[str, ...]] = tuple,
    ):
        self.path, self._read, self._names = path, read, names
        self._part = functools.cache(lambda split: read[split]())
        self.split_names = {split: split for split in read if split}

    def open(self, data: ConfigDict, split: str) -> View:
        """The images of `split`; ValueError where they have other channels than configured."""
        images, labels = self._part(split if self.split_names else "")
        if data.num_channels not in (0, images.shape[3]):
            raise ValueError(
                f"data.path={self.path} has images of {images.shape[3]} channels, not of "
                f"data.num_channels={data.num_channels}"
            )
        number = len(images)
        index = np.arange(number)
        if not self.split_names:
            index = held_out(number, split, data.held_out, data.groups)
        elif split == "test" and labels is None:  # training needs none there
            labels = np.full(number, -1)
        return View(
            source=images,
            prepare=to_size(cropped_then_resized, data.image_size),
            index=index,
            classes_of_all=partial(self._classes, labels, number),
            digest_of=partial(_digest, images, labels if data.num_classes else None),
        )

    def measure_scale(self, watch: Callable = iter) -> Measured:
        """(): they have 8 bits."""
        return Measured(())

    def _classes(self, labels: NDArray | None, number: int) -> Classes:
        if labels is None:
            raise ValueError(f"data.path={self.path}: there is no file of labels beside the images")
        if len(labels) != number:
            raise ValueError(f"data.path={self.path}: {len(labels):,} labels of {number:,} images")
        return Classes(labels, self._names())


def _digest(images: NDArray, labels: NDArray | None, index: NDArray[np.int64]) -> str:
    arrays = [images] if labels is None else [images, labels]
    return digests.of_words([digests.of_array(array) for array in arrays], index)
