"""Exact fields between two sets of charges, and toys in the plane to try them on."""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from methods.field import difference_field
from samplers.field_lines import carry
from sources.toys import TOYS


class ExactPlates(NamedTuple):
    """Charges `positive` (n, N) on the plate z = 0 and `negative` (m, N) on the plate z = L."""

    positive: torch.Tensor
    negative: torch.Tensor
    L: float
    z_min: float

    def carry(self, x, seed, **options):
        """The ends (B, N) of a line from each of `x` (B, N); nan where it is given up."""
        plates = {"positive": self.positive, "negative": self.negative, "L": self.L}
        generator = torch.Generator().manual_seed(seed)
        options = {"rtol": 1e-3, "atol": 1e-3, "max_evaluations": 1000} | options
        direction = partial(difference_field, **plates)
        return carry(direction, x, self.L, self.z_min, generator, **options)[0]


def toy_points(name, number, seed=0):
    """Draws (number, 2) of a toy in the plane, from its Gaussians."""
    toy, random = TOYS[name](), np.random.default_rng(seed)
    centres = toy.centres[random.integers(len(toy.centres), size=number)]
    return torch.from_numpy(centres + toy.std * random.standard_normal(centres.shape))


def moments(x):
    """Both means, both standard deviations and the covariance of points (n, 2)."""
    (a, b), (c, d) = x.mean(0), x.std(0)
    return a, b, c, d, np.cov(x.T)[0, 1]
