"""Compare the ends of exact field lines between two toys with the data, for several distances L.

    python3 benchmarks/field_matching.py [--number 500] [--lines 2]

`number` points of each toy are the charges, `lines` lines start at each charge of the prior, and L
is the distance between the plates. "All" lines leave on both sides and pass z = L where there is no
charge (`solvers/field_lines.py`); lines "forward alone" leave upwards and end where they first
reach z = L. K-S is the larger of the two coordinates' Kolmogorov-Smirnov statistics against the
charges. Errors of means and standard deviations are in units of the standard deviation. Missed is
the share of the data's charges near which no line ends.
"""

from functools import partial

import common
import numpy as np
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from methods.field import difference_field
from methods.field_matching import start_radius
from solvers.field_lines import follow, leave
from sources.toys import TOYS

DISTANCES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
Z_MIN, NEAR = 2e-3, 0.02
PAIR = ("eight_gaussians", "moons")


def points_of(toy: str, number: int) -> Tensor:
    """Random points (number, 2) of a toy."""
    mixture, random = TOYS[toy](), np.random.default_rng(len(toy))
    centres = mixture.centres[random.integers(len(mixture.centres), size=number)]
    return torch.from_numpy(centres + mixture.std * random.standard_normal(centres.shape))


def ends_of(positive: Tensor, negative: Tensor, start: Tensor, L: float, all_lines: bool) -> Tensor:
    """Ends (n, 2) of the lines from `start` (n, 2)."""
    direction = partial(difference_field, positive=positive, negative=negative, L=L)
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    normal, luck = torch.randn(len(start), 3, **draw), torch.rand(2, len(start), **draw)
    if not all_lines:  # all lines leave upwards, and none passes through the plate
        luck = torch.stack([torch.zeros(len(start)), torch.full((len(start),), 2.0)]).double()
    points = leave(direction, start, normal, luck[0], start_radius(Z_MIN, 2))
    return follow(direction, points, luck[1], plate=L, margin=Z_MIN)[0]


def main() -> None:
    options = common.options(__doc__, number=500, lines=2)
    positive, negative = (points_of(toy, options.number) for toy in PAIR)
    print("| L | lines | K-S | means | deviations | missed |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for L in DISTANCES:
        for words, all_lines in (("all", True), ("forward alone", False)):
            start = positive.repeat(options.lines, 1)
            ends = ends_of(positive, negative, start, L, all_lines)
            ends = ends[ends.isfinite().all(1)]
            statistic = max(ks_2samp(ends[:, i], negative[:, i]).statistic for i in (0, 1))
            std = negative.std(0)
            means = ((ends.mean(0) - negative.mean(0)) / std).abs().max()
            deviations = (ends.std(0) / std - 1).abs().max()
            missed = (torch.cdist(negative, ends).amin(1) > NEAR).double().mean()
            numbers = (f"{value:.3f}" for value in (statistic, means, deviations, missed))
            print(f"| {L:g} | {words} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
