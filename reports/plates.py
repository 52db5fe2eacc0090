"""Field matching between two toys in the plane, shown on one page.

    python3 -m reports.plates WORKDIR --out PNG

WORKDIR is a run of `configs/efm/toys.py`. Amber: the densities of the prior, on the lower plate,
and of the data. Blue: exact field lines, of `CHARGES` points on each plate, and their ends. Black:
the ends of the network's lines. The program also prints how far both kinds of ends are from the
data.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

import datasets
from configs.keys import with_home
from experiment import Experiment
from methods.field import difference_field
from reports import streams
from reports.field_lines import in_space
from reports.table import format_table
from reports.toy import BLUE, INK, PAPER, draw_plane, draw_space, load
from samplers.field_lines import carry
from sources.toys import TOYS, Mixture
from storage.files import atomic_write

CHARGES = 1_000  # points on each plate that make the exact field
LINES, SAMPLES = 100, 2_000  # number of lines that are shown, and of ends that are compared
BEYOND = 1.3  # height that is shown below and above the plates

Points = NDArray[np.float64]  # (n, 2)


def points_of(parts: Experiment) -> tuple[Points, Points]:
    """Training points of the prior and of the data, as the network sees them, in random order."""
    random = np.random.default_rng(0)
    both = parts.method.prior.images, parts.data.get("train")[:]
    encoded = [parts.codec.encode(parts.codec.units(points)).flatten(1) for points in both]
    return tuple(random.permutation(points.double().numpy()) for points in encoded)


def exact_ends(
    parts: Experiment, positive: Points, negative: Points, number: int, paths: list[Points]
) -> Points:
    """Ends of the exact lines from `number` of the `positive` charges; the lines enter `paths`."""
    charges = {"positive": torch.from_numpy(positive), "negative": torch.from_numpy(negative)}
    direction = partial(difference_field, **charges, L=parts.method.L)
    start = charges["positive"][torch.arange(number) % len(positive)]
    ends, _ = carry(
        direction,
        start,
        parts.method.L,
        parts.method.z_min / 10,  # small, since lines come close to point charges
        datasets.keyed_generator("cpu", "exact lines", parts.seed),
        rtol=1e-3,
        atol=1e-3,
        record=lambda points: paths.append(points[:LINES].numpy()),
    )
    return ends.numpy()


def learned_ends(parts: Experiment, number: int) -> Points:
    """Ends of `number` lines of the network from random points of the prior; nan if given up."""
    generator = datasets.keyed_generator(parts.device, "samples", parts.seed, 0)
    images, _ = parts.sampler(parts.network, number, generator=generator)
    return parts.codec.encode(images).flatten(1).double().cpu().numpy()


def distances(ends: Points, toy: Mixture) -> tuple[float, float, float, float]:
    """Differences between the distribution of `ends` (n, 2) and the distribution `toy`.

    Returns the largest difference of the means, and of the standard deviations, in units of the
    toy's standard deviations; the largest difference of the marginals' distribution functions (the
    Kolmogorov-Smirnov statistic); and the share of lines that did not end.
    """
    ended = ends[np.isfinite(ends).all(1)]
    mean = toy.centres.mean(0)
    std = np.sqrt(toy.centres.var(0) + toy.std**2)
    of_means, of_stds = np.abs(ended.mean(0) - mean) / std, np.abs(ended.std(0) / std - 1)
    sorted_ends, share = np.sort(ended, 0), np.arange(len(ended) + 1)[:, None] / len(ended)
    steps = torch.from_numpy((sorted_ends[:, None] - toy.centres) / toy.std)
    expected = torch.special.ndtr(steps).mean(1).numpy()
    statistic = max(np.abs(share[1:] - expected).max(), np.abs(share[:-1] - expected).max())
    return of_means.max(), of_stds.max(), statistic, 1 - len(ended) / len(ends)


# --- the page -------------------------------------------------------------------------------------


def draw_page(
    prior: Mixture,
    data: Mixture,
    L: float,
    paths: list[Points],
    ends: dict[str, Points],
    path: Path,
) -> None:
    """Save the page, a PNG: lines by step in `paths`, (LINES, 3) each, and `ends` by name."""
    figure = Figure(figsize=(11, 8.6), dpi=100, facecolor=PAPER)
    grid = figure.add_gridspec(
        2, 4, width_ratios=(1, 1, 1, 1), height_ratios=(1.7, 1), left=0.02, right=0.98, top=0.95,
        bottom=0.05, hspace=0.15,
    )  # fmt: skip
    _draw_lines(figure.add_subplot(grid[0, :]), prior, data, L, paths)
    draw_plane(figure.add_subplot(grid[1, 0]), prior, "prior")
    draw_plane(figure.add_subplot(grid[1, 1]), data, "data")
    for i, (name, points) in enumerate(ends.items()):
        axes = figure.add_subplot(grid[1, 2 + i])
        statistic = distances(points, data)[2]
        draw_plane(axes, data, name, f"Kolmogorov-Smirnov {statistic:.3f}", faint=True)
        axes.plot(*points.T, ",", color=INK if i else BLUE, alpha=0.8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _draw_lines(axes: Axes, prior: Mixture, data: Mixture, L: float, paths: list[Points]) -> None:
    view = (-2.9, 2.9, -BEYOND, 0.92 * L + BEYOND)
    draw_space(axes, prior, view)
    draw_space(axes, data, view, height=L)
    lines = in_space(np.stack(paths, 1))
    axes.add_collection(LineCollection(lines, colors=BLUE, alpha=0.5, linewidths=1))
    axes.set_title(f"exact field lines, L = {L:g}", fontsize=15, color=INK, pad=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="PNG of the page")
    options = parser.parse_args()
    try:
        out = Path(with_home("--out", str(options.out)))
        parts = load(options.workdir)
        if not parts.method.follows_lines:
            raise ValueError(f"{options.workdir} is a run of {parts.method.name}: use reports.toy")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    positive, negative = points_of(parts)
    paths: list[Points] = []
    ends = {
        "exact": exact_ends(parts, positive[:CHARGES], negative[:CHARGES], SAMPLES, paths),
        "learned": learned_ends(parts, SAMPLES),
    }
    prior, data = TOYS[parts.data.options.prior_dataset](), TOYS[parts.data.name]()
    rows = [
        (name, "means {:.3f}, deviations {:.3f}, K-S {:.3f}, not ended {:.3f}".format(*values))
        for name, values in ((name, distances(points, data)) for name, points in ends.items())
    ]
    print(format_table(rows, f"{SAMPLES} lines, L = {parts.method.L:g}, from the data by"))
    draw_page(prior, data, parts.method.L, paths, ends, out)
    print(f"page: {out}")


if __name__ == "__main__":
    streams.make_lenient()
    main()
