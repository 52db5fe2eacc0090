"""Measures of training images as the network sees them, on which methods depend."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from configs.schema import REFERENCE_STD
from sources.stream import SMALL, DataSet, batch_at, in_order

log = logging.getLogger(__name__)

SAMPLED = 2000  # images of which distances and the standard deviation are estimated
MOST_ENTRIES = 2**27  # of all these together: 512 MiB


class Measures(Protocol):
    """Measures of the training images, in the form that the network sees."""

    def mean_norm(self) -> float:
        """The mean Euclidean norm of an image."""
        ...

    def standard_deviation(self) -> float:
        """The standard deviation of all entries of the images."""
        ...

    def largest_distance(self) -> float:
        """The largest Euclidean distance between two images."""
        ...


@dataclass(frozen=True)
class ImageMeasures:
    """Measures of up to `SAMPLED` images of `data`, spread evenly; `encode` encodes stored ones."""

    data: DataSet
    encode: Callable[[Tensor], Tensor]

    @functools.cached_property
    def images(self) -> Tensor:
        """The encoded images (n, D), float32."""
        dim = self.encode(self.data[:1]).numel()
        number = max(2, min(SAMPLED, len(self.data), MOST_ENTRIES // dim))
        rows = torch.linspace(0, len(self.data) - 1, number, dtype=torch.float64).long()
        parts = (batch_at(self.data, part).images for part in rows.split(100))
        return torch.cat([self.encode(images).flatten(1) for images in parts])

    def standard_deviation(self) -> float:
        """The standard deviation of all entries; EDM's 0.5 where it is 0, as a log line says."""
        images = self.images
        mean = images.mean(dtype=torch.float64)
        squares = [(part.double() - mean).square().sum() for part in images.split(100)]
        if not (variance := (sum(squares) / images.numel()).item()):
            log.warning("all entries of all training images are equal: model.sigma_data is 0.5")
            return REFERENCE_STD
        return variance**0.5

    def largest_distance(self) -> float:
        """The largest Euclidean distance between two images; ValueError where it is 0."""
        images = self.images
        distance = max(torch.cdist(part, images).max().item() for part in images.split(100))
        if not distance:
            raise ValueError("all training images are equal: set model.sigma_max")
        return distance


def mean_norm(data: DataSet, encode: Callable[[Tensor], Tensor]) -> float:
    """Mean Euclidean norm of a data set's images, which `encode` takes as stored."""
    total, at_once = 0.0, max(1, SMALL // data[:1].numel())
    for batch in in_order(data, at_once):
        total += encode(batch.images).flatten(1).norm(dim=1).sum().item()
    return total / len(data)
