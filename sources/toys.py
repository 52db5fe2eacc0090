"""Distributions in the plane as data: points (a, b) are images of two channels and one pixel.

Each is a mixture of equal Gaussians, so that its density is known in closed form, and so is the
probability of each of the 256 x 256 values that a point of two bytes has. The train and test images
are independent draws from the latter.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from numpy.typing import NDArray

from sources.base import Source

SIZES = {"train": 20_000, "test": 2_000}  # points of a split
EDGES = np.arange(257) / 128 - 1  # of the values that a byte stands for, in [-1, 1]

Points = NDArray[np.float64]  # (n, 2), where data are scaled to [-1, 1]


class Mixture(NamedTuple):
    """Gaussians of one standard deviation around `centres` (K, 2), each as likely."""

    centres: Points
    std: float

    def density(self, ticks: NDArray[np.float64]) -> NDArray[np.float64]:
        """The density at all points (a, b) with a and b of `ticks` (n,), as (n, n)."""
        squared = np.square((ticks[:, None] - self.centres.T[:, None]) / self.std)  # (2, n, K)
        across, up = np.exp(-squared / 2) / (self.std * math.sqrt(2 * math.pi))
        return across @ up.T / len(self.centres)

    def cells(self) -> NDArray[np.float64]:
        """The probability (256, 256) of each pair of bytes: the mass of its cell.

        Bytes 0 and 255 have the mass beyond them too, so that the sum is 1.
        """
        steps = (EDGES[:, None] - self.centres.T[:, None]) / self.std  # (2, 257, K)
        cumulated = torch.special.ndtr(torch.from_numpy(steps)).numpy()
        cumulated[:, 0], cumulated[:, -1] = 0, 1
        across, up = np.diff(cumulated, axis=1)
        return across @ up.T / len(self.centres)

    def bits_per_dim(self) -> float:
        """The entropy of the pairs of bytes, in bits for each of the two.

        No model of their distribution has fewer bits/dim on average.
        """
        p = self.cells()
        return -np.sum(p * np.log2(p, where=p > 0, out=np.zeros_like(p))) / 2


def _lattice(inside: Callable[..., NDArray[np.bool_]], step: float, std: float) -> Mixture:
    """A region of the plane, filled evenly: with std >= step it varies by 1e-8 inside."""
    ticks = np.arange(-1 + step / 2, 1, step)
    a, b = np.meshgrid(ticks, ticks, indexing="ij")
    mask = inside(a, b)
    return Mixture(np.stack([a[mask], b[mask]], 1), std)


def _curve(a: NDArray, b: NDArray, std: float, number: int = 200) -> Mixture:
    """Along a curve through many points (a, b): `number` centres at equal distances."""
    length = np.concatenate([[0], np.hypot(np.diff(a), np.diff(b)).cumsum()])
    at = np.linspace(0, length[-1], number)
    return Mixture(np.stack([np.interp(at, length, a), np.interp(at, length, b)], 1), std)


def moons() -> Mixture:
    """Two half circles, each around an end of the other one."""
    angle = np.linspace(0, math.pi, 1000)
    a, b = 0.5 * np.cos(angle) - 0.25, 0.5 * np.sin(angle) - 0.125
    upper = _curve(a, b, std=0.05, number=100)
    return Mixture(np.concatenate([upper.centres, -upper.centres]), upper.std)


def swiss_roll() -> Mixture:
    """A spiral of one and a half turns."""
    angle = np.linspace(1.5 * math.pi, 4.5 * math.pi, 2000)
    radius = 0.75 * angle / angle[-1]
    return _curve(radius * np.cos(angle), radius * np.sin(angle), std=0.035)


def checkerboard() -> Mixture:
    """The eight black squares of 4 x 4."""

    def black(a, b):
        column, row = np.floor((a + 0.8) / 0.4), np.floor((b + 0.8) / 0.4)
        return (np.maximum(abs(a), abs(b)) < 0.8) & ((column + row) % 2 == 0)

    return _lattice(black, step=0.025, std=0.025)


def heart() -> Mixture:
    """The inside of a heart."""

    def inside(a, b):
        a, b = a / 0.7, (b + 0.08) / 0.7
        return (a**2 + b**2 - 1) ** 3 < a**2 * b**3

    return _lattice(inside, step=0.025, std=0.025)


def eight_gaussians() -> Mixture:
    """Eight of them on a circle."""
    angle = np.arange(8) * math.pi / 4
    return Mixture(0.7 * np.stack([np.cos(angle), np.sin(angle)], 1), 0.06)


# data.dataset -> the distribution.
TOYS: dict[str, Callable[[], Mixture]] = {
    "moons": moons,
    "swiss_roll": swiss_roll,
    "checkerboard": checkerboard,
    "heart": heart,
    "eight_gaussians": eight_gaussians,
}


@cache
def _points(toy: str, split: str) -> NDArray[np.uint8]:
    p, key = TOYS[toy]().cells(), (list(SIZES).index(split), list(TOYS).index(toy))
    flat = np.random.default_rng(key).choice(p.size, SIZES[split], p=p.ravel() / p.sum())
    return np.stack(np.unravel_index(flat, p.shape), 1).astype(np.uint8)


def open_toy(data: ConfigDict, split: str, toy: str) -> Source:
    """20,000 points of a distribution to train on, 2,000 to test on, (1, 1, 2) each.

    Raises ValueError where the config does not have this shape.
    """
    if data.num_channels not in (0, 2) or data.image_size not in (0, 1, (1, 1)):
        raise ValueError(
            f"data.dataset={toy!r} has points, images of one pixel and two channels: set "
            "data.image_size=1, data.num_channels=2"
        )
    return _points(toy, split).reshape(-1, 1, 1, 2)
