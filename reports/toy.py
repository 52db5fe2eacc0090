"""Methods on points of the plane, shown on one page and as a film.

    python3 -m reports.toy WORKDIR ... --out PNG [--film WEBP]

The runs (`configs/*/toy_mlp.py`) are of one toy; each is called as its workdir. Amber: the data, in
closed form (`sources/toys.py`). Blue: exact field lines, those of `CHARGES` training points. Black:
what the networks have learned. The console gets the bits/dim.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import datasets
import experiment
from configs.keys import with_home
from experiment import Experiment
from methods.base import Method
from reports import streams
from reports.field_lines import Points, depth_of, exact_slope, field_lines, in_space, trajectory
from reports.plots import PALETTE
from reports.table import format_table
from solvers import SCHEDULES
from sources.toys import TOYS, Mixture
from storage.files import atomic_write

PAPER, INK, SOFT, RULE, BLUE, AMBER = (
    PALETTE[name] for name in ("paper", "ink", "soft", "rule", "blue", "amber")
)
FAINT = 3.5  # by how much lighter the density is below dots and lines
DENSITY = LinearSegmentedColormap.from_list("density", [PAPER, "#f3c79b", AMBER])

CHARGES = 2_000  # training points that make the exact lines
LINES, TRAJECTORIES, STEPS = 160, 24, 60
FAR = 3.0  # radius of the hemisphere where lines start
WINDOW, SHEET = 1.15, 1.5  # half sides of a picture of the plane, and of the plane in space
TESTED, SAMPLES = 400, 2_000  # points whose bits/dim are told, and that are shown of each method
FRAMES, FRAME_MS, HOLD_MS = 48, 80, 1800


def load(workdir: Path) -> Experiment:
    """The experiment of the run in `workdir`, its network with the EMA weights.

    Raises:
        OSError, ValueError: there is none (see `experiment.load`), or its data are no toy.
    """
    parts = experiment.load(workdir).experiment
    if parts.data.name not in TOYS:
        raise ValueError(f"{workdir} is of {parts.data.name}; known toys: {', '.join(TOYS)}")
    return parts


def exact_bits(toy: Mixture, points: NDArray[np.uint8]) -> float:
    """Mean bits/dim of `points` (n, 2) under the exact distribution of their bytes."""
    return -np.log2(toy.cells()[points[:, 0], points[:, 1]]).mean() / 2


def learned_bits(parts: Experiment, points: Tensor) -> float:
    """Mean bits/dim of `points`, uint8 (n, 2, 1, 1), under the ODE of an experiment."""
    generator = datasets.keyed_generator("cpu", "bits/dim", parts.seed)
    images = parts.codec.dequantized(points, generator)
    bits, _, _ = parts.likelihood(parts.network, parts.codec.encode(images), generator)
    return bits.mean().item()


# --- the page -------------------------------------------------------------------------------------


def draw_plane(axes: Axes, toy: Mixture, title: str, below: str = "", faint: bool = False) -> None:
    """An empty picture of the plane with the density of the data."""
    density = toy.density(np.linspace(-WINDOW, WINDOW, 241)).T  # rows are up
    most = density.max() * (FAINT if faint else 1)
    extent = (-WINDOW, WINDOW, -WINDOW, WINDOW)
    axes.imshow(density, DENSITY, extent=extent, origin="lower", vmin=0, vmax=most)
    axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
    axes.set_title(title, fontsize=15, color=INK, pad=7)
    axes.set_xlabel(below, fontsize=13, color=SOFT, labelpad=6)
    axes.spines[:].set_color(RULE)


def draw_space(
    axes: Axes, toy: Mixture, view: tuple[float, ...], faint: bool = False, height: float = 0.0
) -> None:
    """Axes of the space (x, z) that show only the data, in the plane z = `height`."""
    edge = np.linspace(-SHEET, SHEET, 161)
    density = toy.density((edge[1:] + edge[:-1]) / 2)
    a, b = np.meshgrid(edge, edge, indexing="ij")
    across, up = np.moveaxis(in_space(np.stack([a, b, 0 * a + height], -1)), -1, 0)
    most = density.max() * (FAINT if faint else 1)
    axes.pcolormesh(across, up, density, cmap=DENSITY, vmin=0, vmax=most, zorder=0)
    corners = SHEET * np.array([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0), (-1, -1, 0)])
    corners[:, 2] = height
    axes.plot(*in_space(corners).T, color=SOFT, linewidth=0.8, zorder=1)
    axes.set(xlim=view[:2], ylim=view[2:], aspect="equal")
    axes.axis("off")


def _lines(axes: Axes, lines: Points, color: str, **options) -> None:
    """Draw lines (N, number, 2)."""
    axes.add_collection(LineCollection(lines.swapaxes(0, 1), colors=color, **options))


def draw_page(
    experiments: dict[str, Experiment], data: Tensor, bits: dict[str, float], path: Path
) -> None:
    """Save the page of `experiments`, by name, on the training points `data` (n, 2, 1, 1), a PNG.

    `bits` are bits/dim, by the same names, and "exact".
    """
    first, *_ = experiments.values()
    toy, charges, title = TOYS[first.data.name](), data[:CHARGES], first.data.name.replace("_", " ")
    figure = Figure(figsize=(11, 10.6), dpi=100, facecolor=PAPER)
    grid = figure.add_gridspec(
        3, 12, height_ratios=(1.62, 1, 1), hspace=0.2, wspace=0.6, left=0.03, right=0.97,
        top=0.96, bottom=0.035,
    )  # fmt: skip
    lines = field_lines(charges, LINES, FAR, STEPS)
    _draw_field(figure.add_subplot(grid[0, :7]), figure.add_subplot(grid[0, 7:]), toy, lines)
    upper, lower = (
        [figure.add_subplot(grid[row, 3 * i : 3 * i + 3]) for i in range(4)] for row in (1, 2)
    )
    draw_plane(upper[0], toy, f"data: {title}", f"exact: {bits['exact']:.2f} bits/dim")
    _draw_words(lower[0])
    columns = zip(experiments.items(), upper[1:], lower[1:], strict=False)
    for (name, parts), samples, trajectories in columns:
        method, net = parts.method, parts.network
        draw_plane(samples, toy, name, f"learned: {bits[name]:.2f} bits/dim", faint=True)
        generator = datasets.keyed_generator("cpu", "samples", parts.seed, 0)
        points = parts.codec.encode(parts.sampler(net, SAMPLES, generator=generator)[0])
        samples.plot(*points[:, :, 0, 0].T, ",", color=INK, alpha=0.8)
        draw_plane(trajectories, toy, "", "learned and exact lines", faint=True)
        y, levels = _starts(method, TRAJECTORIES)
        exact = exact_slope(charges.double(), method.degrees_of_freedom)
        _lines(trajectories, trajectory(exact, y.double(), levels), BLUE, linewidths=3, alpha=0.4)
        with torch.no_grad():
            learned = trajectory(partial(method.slope, net), y, levels)
        _lines(trajectories, learned, INK, linewidths=1)
        trajectories.plot(*learned[-1].T, ".", color=INK, markersize=5)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _starts(method: Method, number: int) -> tuple[Tensor, Tensor]:
    """Prior samples y (number, 2, 1, 1), and the noise levels from there to the data."""
    generator = datasets.keyed_generator("cpu", "trajectories", 0)
    levels = SCHEDULES["logsnr"](method, STEPS, 7.0)
    prior = method.prior_sampling((number, 2, 1, 1), generator)
    return prior / method.alpha(method.time(levels[0])).item(), levels


def _draw_field(space: Axes, plane: Axes, toy: Mixture, lines: Points) -> None:
    """Exact field lines, (N, number, 3), in the space (x, z), and seen from above."""
    draw_space(space, toy, (-2.75, 2.75, -1.25, 2.85))
    for k in np.argsort(depth_of(lines[0]))[::-1]:  # from the back
        line = in_space(lines[:, k])
        segments = np.stack([line[:-1], line[1:]], 1)
        fade = np.clip(1 - np.linalg.norm(lines[:-1, k], axis=1) / FAR, 0.08, 0.75)
        space.add_collection(LineCollection(segments, colors=BLUE, alpha=fade, linewidths=1.1))
    space.set_title("field lines of the data in (x, z)", fontsize=15, color=INK, pad=4)
    across, up = in_space(np.array([0, 0, FAR * 0.92]))
    space.annotate(
        "z", (across, 0.02), (across, up), color=SOFT, fontsize=14, ha="center",
        arrowprops={"arrowstyle": "<-", "color": SOFT, "shrinkB": 0}, zorder=0,
    )  # fmt: skip
    draw_plane(plane, toy, "the same lines from above", faint=True)
    _lines(plane, lines[..., :2], BLUE, linewidths=1, alpha=0.6)


def _draw_words(axes: Axes) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for y, color, width, alpha, words in (
        (0.72, BLUE, 4, 0.5, "exact field line"),
        (0.5, INK, 1.4, 1, "learned by the network"),
        (0.28, AMBER, 9, 1, "density of the data"),
    ):
        axes.plot([0.02, 0.14], [y, y], color=color, linewidth=width, alpha=alpha)
        axes.text(0.2, y, words, color=INK, fontsize=13, va="center")


# --- the film -------------------------------------------------------------------------------------


def draw_film(parts: Experiment, path: Path) -> None:
    """Save the learned flow, from the noise level `FAR` down to the data, as a WebP."""
    method, toy = parts.method, TOYS[parts.data.name]()
    y, _ = _starts(method, SAMPLES)
    last, first = method.level_range
    above = torch.linspace(math.log(first), math.log(FAR), 20, dtype=torch.float64).exp()
    levels = torch.linspace(1, 0, FRAMES, dtype=torch.float64) ** 1.5 * (FAR - last) + last
    slope = partial(method.slope, parts.network)
    with torch.no_grad():
        states = trajectory(slope, y, torch.cat([above, levels[1:]]))[len(above) - 1 :]
    canvas = FigureCanvasAgg(Figure(figsize=(5.6, 4.2), facecolor=PAPER, dpi=100))
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    draw_space(axes, toy, (-2.1, 2.1, -1.05, 2.1), faint=True)
    (dots,) = axes.plot([], [], ".", color=INK, markersize=3, alpha=0.8, markeredgewidth=0)
    frames = []
    for x, z in zip(states, levels.tolist(), strict=True):
        dots.set_data(*in_space(np.insert(x, 2, z, axis=1)).T)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    times = [FRAME_MS] * (len(frames) - 1) + [HOLD_MS]
    with atomic_write(path) as file:
        options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
        frames[0].save(file, format="webp", quality=55, method=4, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="PNG of the page")
    parser.add_argument("--film", type=Path, help="WebP of the first run's flow")
    options = parser.parse_args()
    try:
        out = Path(with_home("--out", str(options.out)))
        film = options.film and Path(with_home("--film", str(options.film)))
        experiments = {workdir.name: load(workdir) for workdir in options.workdirs}
        for parts in experiments.values():
            parts.check_likelihood()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if len(experiments) < len(options.workdirs):
        parser.error("two workdirs have the same name")
    first, *_ = experiments.values()
    train, test = first.data.get("train"), first.data.get("test")
    toy, tested = TOYS[first.data.name](), test[:TESTED]
    bits = {"exact": exact_bits(toy, tested.flatten(1).numpy())}
    bits |= {name: learned_bits(parts, tested) for name, parts in experiments.items()}
    rows = [(name, f"{value:.3f}") for name, value in bits.items()]
    rows.append(("entropy of the data", f"{toy.bits_per_dim():.3f}"))
    print(format_table(rows, f"bits/dim of {TESTED} test points, {first.data.name}"))
    scaled = first.codec.encode(first.codec.units(train[:]))
    draw_page(experiments, scaled, bits, out)
    print(f"page: {out}")
    if film:
        draw_film(first, film)
        print(f"film: {film}")


if __name__ == "__main__":
    streams.make_lenient()
    main()
