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
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import datasets
import experiment
from experiment import Experiment
from methods.base import Method
from methods.field import posterior_mean
from reports.table import format_table
from solvers import SCHEDULES
from solvers.base import Slope
from solvers.fixed_steps import heun
from sources.toys import TOYS, Mixture
from storage.files import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# As in page.css.
PAPER, INK, SOFT, RULE = "#fdfcfa", "#1c1e22", "#666a72", "#e5e1d9"
BLUE, AMBER = "#1f5fa8", "#b8520f"
FAINT = 3.5  # by how much lighter the density is below dots and lines
DENSITY = LinearSegmentedColormap.from_list("density", [PAPER, "#f3c79b", AMBER])

CHARGES = 2_000  # training points that make the exact lines
LINES, TRAJECTORIES, STEPS = 160, 24, 60
FAR = 3.0  # radius of the hemisphere where lines start
WINDOW, SHEET = 1.15, 1.5  # half sides of a picture of the plane, and of the plane in space
TESTED, SAMPLES = 400, 2_000  # points whose bits/dim are told, and that are shown of each method
AZIMUTH, ELEVATION = math.radians(-28), math.radians(24)  # from where the space (x, z) is seen
FRAMES, FRAME_MS, HOLD_MS = 48, 80, 1800

Points = NDArray[np.float64]  # (..., 2)


class Run(NamedTuple):
    """A trained run and its name."""

    name: str
    experiment: Experiment


def load(workdir: Path) -> Run:
    """The run in `workdir`, its network with the EMA weights.

    Raises:
        OSError, ValueError: there is none (see `experiment.load`), or its data are no toy.
    """
    trained = experiment.load(workdir)
    name = trained.experiment.data.name
    if name not in TOYS:
        raise ValueError(f"{workdir} is of {name}; known toys: {', '.join(TOYS)}")
    return Run(workdir.name, trained.experiment)


# --- lines ----------------------------------------------------------------------------------------


def exact_slope(data: Tensor, D: float) -> Slope:
    """dy/dsigma (B, C, H, W) where the data are exactly the points `data` (n, C, H, W).

    It is (y - E[data | y]) / sigma for every method; `D` are the degrees of freedom of its noise,
    and levels one for all or one each, (B,).
    """

    def slope(y: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=y.dtype).expand(len(y))
        return (y - posterior_mean(y, data, sigma, D)) / sigma.view(-1, 1, 1, 1)

    return slope


def trajectory(slope: Slope, y: Tensor, levels: Tensor) -> Points:
    """The states (N + 1, B, 2) of points `y` (B, 2, 1, 1) at noise `levels` (N + 1,)."""
    states = []
    end = heun(slope, y, levels, lambda step: states.append(step.x))
    return torch.stack([*states, end]).flatten(2).double().numpy()


def field_lines(data: Tensor, number: int, far: float) -> NDArray[np.float64]:
    """Lines of the Poisson field of `data` (n, 2, 1, 1), from a hemisphere of radius `far` down.

    Each starts in the middle of an equal share of the hemisphere, so that each carries the same
    flux. Returns points (x, z) along each, (N + 1, number, 3); they end at a thousandth of the
    height they start from.
    """
    k = torch.arange(number, dtype=torch.float64) + 0.5
    height, angle = k / number, math.pi * (1 + math.sqrt(5)) * k  # Fibonacci's lattice
    width = (1 - height**2).sqrt()
    start = far * torch.stack([width * angle.cos(), width * angle.sin()], 1)
    slope, z = exact_slope(data.double(), 1.0), far * height

    def down(x: Tensor, share: float) -> Tensor:  # all lines together: dx/dlog(share) = z dx/dz
        at = z * math.exp(share)
        return at.view(-1, 1, 1, 1) * slope(x, at)

    shares = torch.linspace(0, math.log(1e-3), STEPS + 1, dtype=torch.float64)
    x = trajectory(down, start.view(-1, 2, 1, 1), shares)
    return np.concatenate([x, (shares.exp()[:, None] * z)[..., None].numpy()], 2)


def in_space(points: NDArray[np.float64]) -> Points:
    """Where points (x, z), (..., 3), lie on paper, seen from above and aside without vanishing."""
    a, b, z = np.moveaxis(points, -1, 0)
    across = math.cos(AZIMUTH) * a + math.sin(AZIMUTH) * b
    deep = -math.sin(AZIMUTH) * a + math.cos(AZIMUTH) * b
    return np.stack([across, math.sin(ELEVATION) * deep + math.cos(ELEVATION) * z], -1)


# --- numbers --------------------------------------------------------------------------------------


def exact_bits(toy: Mixture, points: NDArray[np.uint8]) -> float:
    """Mean bits/dim of `points` (n, 2) under the exact distribution of their bytes."""
    return -np.log2(toy.cells()[points[:, 0], points[:, 1]]).mean() / 2


def learned_bits(run: Run, points: Tensor) -> float:
    """Mean bits/dim of `points`, uint8 (n, 2, 1, 1), under the run's ODE."""
    parts = run.experiment
    generator = datasets.keyed_generator("cpu", "bits/dim", parts.seed)
    images = datasets.to_unit_interval(points, generator, dequantize=True)
    bits, _, _ = parts.likelihood(parts.network, parts.codec.encode(images), generator)
    return bits.mean().item()


# --- the page -------------------------------------------------------------------------------------


def _plane(axis, toy: Mixture, title: str, below: str = "", faint: bool = False) -> None:
    """An empty picture of the plane with the density of the data."""
    density = toy.density(np.linspace(-WINDOW, WINDOW, 241)).T  # rows are up
    most = density.max() * (FAINT if faint else 1)
    extent = (-WINDOW, WINDOW, -WINDOW, WINDOW)
    axis.imshow(density, DENSITY, extent=extent, origin="lower", vmin=0, vmax=most)
    axis.set(xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=15, color=INK, pad=7)
    axis.set_xlabel(below, fontsize=13, color=SOFT, labelpad=6)
    for spine in axis.spines.values():
        spine.set(color=RULE)


def _space(axis, toy: Mixture, view: tuple[float, ...], faint: bool = False) -> None:
    """The space (x, z) with the data in the plane z = 0, and nothing else yet."""
    edge = np.linspace(-SHEET, SHEET, 161)
    density = toy.density((edge[1:] + edge[:-1]) / 2)
    a, b = np.meshgrid(edge, edge, indexing="ij")
    across, up = np.moveaxis(in_space(np.stack([a, b, 0 * a], -1)), -1, 0)
    most = density.max() * (FAINT if faint else 1)
    axis.pcolormesh(across, up, density, cmap=DENSITY, vmin=0, vmax=most, zorder=0)
    corners = SHEET * np.array([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0), (-1, -1, 0)])
    axis.plot(*in_space(corners).T, color=SOFT, linewidth=0.8, zorder=1)
    left, right, low, high = view
    axis.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    axis.axis("off")


def _lines(axis, lines: Points, color: str, **options) -> None:
    """Lines (N, number, 2)."""
    axis.add_collection(LineCollection(lines.swapaxes(0, 1), colors=color, **options))


def draw_page(runs: list[Run], data: Tensor, bits: dict[str, float], path: Path) -> None:
    """Save the page of `runs` on the training points `data` (n, 2, 1, 1) as a PNG.

    `bits` are bits/dim, by the name of the run, and "exact".
    """
    toy = TOYS[runs[0].experiment.data.name]()
    charges = data[:CHARGES]
    figure = plt.figure(figsize=(11, 10.6), dpi=100, facecolor=PAPER)
    grid = figure.add_gridspec(
        3, 12, height_ratios=(1.62, 1, 1), hspace=0.2, wspace=0.6, left=0.03, right=0.97,
        top=0.96, bottom=0.035,
    )  # fmt: skip
    lines = field_lines(charges, LINES, FAR)
    _draw_field(figure.add_subplot(grid[0, :7]), figure.add_subplot(grid[0, 7:]), toy, lines)
    cells = [[grid[row, 3 * i : 3 * i + 3] for i in range(4)] for row in (1, 2)]
    samples, trajectories = ([figure.add_subplot(c) for c in row] for row in cells)
    name = runs[0].experiment.data.name.replace("_", " ")
    _plane(samples[0], toy, f"data: {name}", f"exact: {bits['exact']:.2f} bits/dim")
    _draw_words(trajectories[0])
    for run, sampled, followed in zip(runs, samples[1:], trajectories[1:], strict=False):
        method, net = run.experiment.method, run.experiment.network
        _plane(sampled, toy, run.name, f"learned: {bits[run.name]:.2f} bits/dim", faint=True)
        generator = datasets.keyed_generator("cpu", "samples", run.experiment.seed, 0)
        drawn = run.experiment.sampler(net, SAMPLES, generator=generator)[0]
        sampled.plot(*run.experiment.codec.encode(drawn)[:, :, 0, 0].T, ",", color=INK, alpha=0.8)
        _plane(followed, toy, "", "learned and exact lines", faint=True)
        y, levels = _starts(method, TRAJECTORIES)
        exact = exact_slope(charges.double(), method.degrees_of_freedom)
        _lines(followed, trajectory(exact, y.double(), levels), BLUE, linewidths=3, alpha=0.4)
        with torch.no_grad():
            learned = trajectory(partial(method.slope, net), y, levels)
        _lines(followed, learned, INK, linewidths=1)
        followed.plot(*learned[-1].T, ".", color=INK, markersize=5)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", facecolor=PAPER)
    plt.close(figure)


def _starts(method: Method, number: int) -> tuple[Tensor, Tensor]:
    """Prior samples y (number, 2, 1, 1), and the noise levels from there to the data."""
    generator = datasets.keyed_generator("cpu", "trajectories", 0)
    levels = SCHEDULES["logsnr"](method, STEPS, 7.0)
    prior = method.prior_sampling((number, 2, 1, 1), generator)
    return prior / method.alpha(method.time(levels[0])).item(), levels


def _draw_field(space, plane, toy: Mixture, lines: NDArray[np.float64]) -> None:
    """Exact field lines, (N, number, 3), in the space (x, z), and seen from above."""
    _space(space, toy, (-2.75, 2.75, -1.25, 2.85))
    order = np.argsort(math.cos(AZIMUTH) * lines[0, :, 1] - math.sin(AZIMUTH) * lines[0, :, 0])
    for k in order[::-1]:  # from the back
        line = in_space(lines[:, k])
        segments = np.stack([line[:-1], line[1:]], 1)
        fade = np.clip(1 - np.linalg.norm(lines[:-1, k], axis=1) / FAR, 0.08, 0.75)
        space.add_collection(LineCollection(segments, colors=BLUE, alpha=fade, linewidths=1.1))
    space.set_title("field lines of the data in (x, z)", fontsize=15, color=INK, pad=4)
    top = in_space(np.array([[0, 0, FAR * 0.92]]))[0]
    space.annotate(
        "z", (top[0], 0.02), (top[0], top[1]), color=SOFT, fontsize=14, ha="center",
        arrowprops={"arrowstyle": "<-", "color": SOFT, "shrinkB": 0}, zorder=0,
    )  # fmt: skip
    _plane(plane, toy, "the same lines from above", faint=True)
    _lines(plane, lines[..., :2], BLUE, linewidths=1, alpha=0.6)


def _draw_words(axis) -> None:
    axis.axis("off")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    for y, color, width, words in (
        (0.72, BLUE, 4, "exact field line"),
        (0.5, INK, 1.4, "learned by the network"),
        (0.28, AMBER, 9, "density of the data"),
    ):
        axis.plot(
            [0.02, 0.14], [y, y], color=color, linewidth=width, alpha=0.5 if width == 4 else 1
        )
        axis.text(0.2, y, words, color=INK, fontsize=13, va="center")


# --- the film -------------------------------------------------------------------------------------


def draw_film(run: Run, path: Path) -> None:
    """Save the learned flow of a run, from the noise level `FAR` down to the data, as a WebP."""
    method, net = run.experiment.method, run.experiment.network
    toy = TOYS[run.experiment.data.name]()
    y, _ = _starts(method, SAMPLES)
    ends = torch.tensor([method.t_prior, method.t_data], dtype=torch.float64)
    first, last = method.sigma(ends).tolist()
    above = torch.linspace(math.log(first), math.log(FAR), 20, dtype=torch.float64).exp()
    shown = torch.linspace(1, 0, FRAMES, dtype=torch.float64) ** 1.5 * (FAR - last) + last
    with torch.no_grad():
        states = trajectory(partial(method.slope, net), y, torch.cat([above, shown[1:]]))[19:]
    figure = plt.figure(figsize=(5.6, 4.2), facecolor=PAPER, dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    _space(axis, toy, (-2.1, 2.1, -1.05, 2.1), faint=True)
    (dots,) = axis.plot([], [], ".", color=INK, markersize=3, alpha=0.8, markeredgewidth=0)
    frames = []
    for x, z in zip(states, shown.tolist(), strict=True):
        dots.set_data(*in_space(np.concatenate([x, np.full((len(x), 1), z)], 1)).T)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
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
        runs = [load(workdir) for workdir in options.workdirs]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    data = runs[0].experiment.data
    train, test = data.get("train"), data.get("test")
    toy, tested = TOYS[data.name](), test[:TESTED]
    bits = {"exact": exact_bits(toy, tested.flatten(1).numpy())}
    bits |= {run.name: learned_bits(run, tested) for run in runs}
    rows = [(name, f"{value:.3f}") for name, value in bits.items()]
    rows.append(("entropy of the data", f"{toy.bits_per_dim():.3f}"))
    print(format_table(rows, f"bits/dim of {TESTED} test points, {data.name}"))
    scaled = runs[0].experiment.codec.encode(datasets.to_unit_interval(train[:]))
    draw_page(runs, scaled, bits, options.out)
    print(f"page: {options.out}")
    if options.film:
        draw_film(runs[0], options.film)
        print(f"film: {options.film}")


if __name__ == "__main__":
    main()
