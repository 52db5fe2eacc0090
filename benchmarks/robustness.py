"""Measure the effect of three kinds of error on samples of trained networks.

    python3 benchmarks/robustness.py WORKDIR ... [--num 1000] [--out docs/robustness.png]

Xu et al. 2023 (PFGM++, arXiv 2302.04265, section 6) find that a smaller D is more robust. Here the
distance (Frechet's, in the space `eval.features`) of samples drawn with the EMA weights from the
training images is measured

1. with noise injected in each of Heun's 18 steps, as the published program does it: before the step
   from noise level sigma, x becomes x + alpha sigma e, e ~ N(0, I). It is Gaussian for every D, and
   sigma is r / sqrt(D);
2. with the weights of all convolutions rounded to few bits after training, symmetrically, a scale
   for each tensor; 1x1 convolutions count, activations stay float (the published program also
   shifts the grid, so that it ends at a tensor's least and largest weight);
3. with fewer and more steps of Heun's.

All settings start from the prior samples that `--mode eval` takes. Workdirs that differ in their
seeds only are one curve, of which mean and range are shown. Samples are stored in the folder
`robustness` of the workdir, and a killed run goes on from them.
"""

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import common
import numpy as np
import torch
from torch import Tensor, nn

import experiment
import sampling
from experiment import Experiment
from methods.base import noise_like
from metrics.reference import ReferenceStatistics
from models.layers import NIN
from reports.images import Images
from reports.plots import draw_range
from solvers import SOLVERS, Solver
from solvers.base import Callback, Slope, Step
from sources.keyed import keyed_generator
from storage.files import cached
from storage.workdir import evaluation_folder


class Setting(NamedTuple):
    """Steps of Heun's, strength of the injected noise, and bits of a weight (None: float32)."""

    n: int = 18
    alpha: float = 0.0
    bits: int | None = None


# Title of a panel -> label on its axis -> the setting.
PANELS = {
    "injected noise, alpha": {f"{alpha:g}": Setting(alpha=alpha) for alpha in (0.0, 0.1, 0.2)},
    "bits of a weight": {"float": Setting()} | {f"{b}": Setting(bits=b) for b in (8, 7, 6, 5)},
    "evaluations": {f"{2 * n - 1}": Setting(n=n) for n in (3, 5, 9, 18, 36)},
}
Distances = dict[Setting, float]


def noisy_heun(
    slope: Slope,
    x: Tensor,
    levels: Tensor,
    callback: Callback | None = None,
    *,
    alpha: float,
    generator: torch.Generator,
) -> Tensor:
    """Heun's method with Gaussian noise of `alpha` times the noise level before each step."""
    last = len(levels) - 2
    for i, (level, next_level) in enumerate(pairwise(levels.tolist())):
        x = x + alpha * level * noise_like(x, generator)
        d, h = slope(x, level), next_level - level
        if callback:
            callback(Step(i, level, x, d))
        x = x + (h * d if i == last else h / 2 * (d + slope(x + h * d, next_level)))
    return x


def quantize(weight: Tensor, bits: int) -> Tensor:
    """Weights rounded to multiples of max|weight| / (2^(bits - 1) - 1), 2^bits - 1 values."""
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step if step > 0 else weight


@contextlib.contextmanager
def quantized(net: nn.Module, bits: int | None) -> Iterator[None]:
    """Within the `with` block the weights of all convolutions of `net` have `bits` bits."""
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | NIN)] if bits else []
    weights = [m.W.data if isinstance(m, NIN) else m.weight.data for m in layers]
    originals = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight.copy_(quantize(weight, bits))
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)


def draw(run: Experiment, setting: Setting, num: int) -> dict:
    """`num` samples, uint8 (num, H, W, C), of the network of `run`; none if any diverges.

    They start from the prior samples of an evaluation, in its rounds.
    """
    config = run.config.copy_and_resolve_references()
    config.sampling.update(method="ode", ode_solver="noisy_heun", schedule="auto", N=setting.n)
    noise = keyed_generator(run.device, "injected noise", config.seed)
    solver = Solver(partial(noisy_heun, alpha=setting.alpha, generator=noise))
    rounds, size = [], config.eval.batch_size
    with mock.patch.dict(SOLVERS, noisy_heun=solver), quantized(run.network, setting.bits):
        sample = sampling.get_sampling_fn(config, run.method)
        for r, first in enumerate(range(0, num, size)):
            generator = keyed_generator(run.device, "samples", config.seed, r)
            try:
                images, _ = sample(run.network, min(size, num - first), generator=generator)
            except FloatingPointError as error:
                print(f"no samples: {error}")
                channels, *sides = run.codec.data_shape
                return {"samples": np.empty((0, *sides, channels), np.uint8)}
            rounds.append(run.codec.stored(images))
    return {"samples": np.concatenate(rounds)}


def distance(samples: Images, statistics: ReferenceStatistics) -> float:
    """Frechet distance of the samples from the data; NaN without samples."""
    if not len(samples):
        return np.nan
    features, _ = statistics.space(samples)
    return statistics.space.backend.frechet_distance(features, statistics.reference.gaussian, None)


def measure(workdir: Path, num: int) -> tuple[str, Distances]:
    """Name of the method of the run in `workdir`, and its distances; NaN where it diverges.

    Raises:
        ValueError, OSError: there is no finished run in `workdir`, or its data cannot be read.
    """
    run = experiment.load(workdir, {"eval.num_samples": num}, fits=False).experiment
    statistics, *_ = ReferenceStatistics.from_config(run.config, run.device, run.data, run.codec)
    if statistics.reference is None:
        statistics.measure(lambda images: None)
    folder, distances = evaluation_folder(workdir, "robustness"), {}
    channels, *sides = run.codec.data_shape
    curve = common.name_of(run.config, run.method)
    origin = run.origin() | {"num": num, "at once": run.config.eval.batch_size}
    for setting in dict.fromkeys(s for panel in PANELS.values() for s in panel.values()):
        name = f"n{setting.n}_alpha{setting.alpha}_bits{setting.bits}"
        compute = partial(draw, run, setting, num)
        result = cached(folder / f"{name}.npz", origin | setting._asdict(), compute, ("samples",))
        distances[setting] = d = distance(result["samples"], statistics)
        seconds = f"{float(result['seconds']):.1f} s"
        print(f"{workdir} ({curve}): {name}: {d:.4f}, {seconds}", flush=True)
    return curve, distances


def over_seeds(runs: list[Distances], setting: Setting) -> tuple[float, float, float]:
    """Mean, least and largest of the distances of `runs` at `setting`."""
    distances = [run[setting] for run in runs]
    return np.mean(distances), np.min(distances), np.max(distances)


def print_tables(curves: dict[str, list[Distances]]) -> None:
    """Print a table of each panel: a row for each curve, with mean and range over its seeds."""
    for title, panel in PANELS.items():
        print(f"\n{title}")
        width = ">22" if any(len(runs) > 1 for runs in curves.values()) else ">8"
        table = common.Table(("curve", "<34"), ("seeds", ">5"), *((x, width) for x in panel))
        for curve, runs in curves.items():
            cells = []
            for setting in panel.values():
                mean, low, high = over_seeds(runs, setting)
                cells.append(f"{mean:.4f}" + (f" ({low:.4f}-{high:.4f})" if low < high else ""))
            table.row(curve, str(len(runs)), *cells)


def plot(curves: dict[str, list[Distances]], path: str) -> None:
    """Save a PNG of the panels: the mean of each curve, in a band from least to largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (title, panel) in zip(axes, PANELS.items(), strict=True):
        for curve, runs in curves.items():
            rows = [over_seeds(runs, setting) for setting in panel.values()]
            means_lows_highs = zip(*rows, strict=True)
            draw_range(axis, [*panel], *means_lows_highs, marker="o", markersize=4, label=curve)
        axis.set(yscale="log", xlabel=title)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("Frechet distance")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = common.options(__doc__, "workdirs", num=1000, out=None)
    curves = defaultdict(list)
    try:
        for workdir, curve in common.curves(options.workdirs).items():
            curves[curve].append(measure(workdir, options.num)[1])
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"\n{options.num} samples, {common.setting()}")
    print_tables(curves)
    if options.out:
        plot(curves, options.out)


if __name__ == "__main__":
    main()
