"""Compare samples in few evaluations: consistency networks, and the denoisers they began as.

    python3 benchmarks/consistency.py WORKDIR ... [--num 4000] [--out docs/consistency.png]
            [--grid docs/consistency_grid.png] [--factors 1000] [--skip fitted]

Each workdir is a run of training.objective='regression', a denoiser, sampled with 35 evaluations
of heun and with the solver 'fitted' in 5, or one of 'consistency', sampled with 1, 2 and 3. Runs of
one method are paired by seed, and draw the same prior samples. The table has the Frechet distance
of pixels from the training images, its ratio to that of heun, precision, recall, images per second.

With `--factors N` a second table has the distance of N samples, in one and in 35 evaluations, from
prior samples of the wrong scale, while the network is told the right noise level: how robust each
number D of augmenting dimensions is. Samplers whose name begins with `--skip` are left out.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
from numpy.typing import NDArray

import experiment
from datasets import batch_at
from library.trained import Trained
from metrics.distances import Gaussian, frechet_distance, precision_recall
from reports.images import Images, channels_last, image_grid
from reports.plots import draw_range
from sources.keyed import keyed_generator
from storage.files import cached, save_png
from storage.workdir import evaluation_folder

HEUN = {"sampling.ode_solver": "heun", "sampling.N": 18}
SAMPLERS = {
    "regression": {
        "heun, 35": HEUN,
        "fitted, 5": {"sampling.ode_solver": "fitted", "sampling.N": 5},
    },
    "consistency": {
        f"consistency, {n}": {"sampling.N": n, "sampling.sigma_max": 20.0} for n in (1, 2, 3)
    },
}
BASELINE = "heun, 35"
FACTORS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)
MARKERS = {"heun": "o", "fitted": "s", "consistency": "^"}
WITH_WRONG_SCALE = (BASELINE, "consistency, 1")
GRID = 64  # images of each picture
PICTURED = ("consistency, 1", "consistency, 2", BASELINE)


class Result(NamedTuple):
    """Measures of one sampler of one run."""

    distance: float
    precision: float
    recall: float
    speed: float  # images per second


def draw(trained: Trained, factor: float, num: int) -> dict:
    """`num` samples, uint8 (num, H, W, C), from prior samples times `factor`, and their speed."""
    parts = trained.experiment
    rounds, size, start = [], parts.sampler.batch_size, time.perf_counter()
    for r, first in enumerate(range(0, num, size)):
        generator = keyed_generator(parts.device, "samples", parts.seed, r)
        shape = (min(size, num - first), *parts.codec.shape)
        x = factor * parts.method.prior_sampling(shape, generator, parts.device)
        conditions = parts.draw_conditions(len(x), "samples", r)
        images, _ = parts.sampler(parts.network, x=x, generator=generator, conditions=conditions)
        rounds.append(parts.codec.stored(images))
    speed = num / (time.perf_counter() - start)
    return {"samples": np.concatenate(rounds), "speed": speed}


def pixels(images: Images) -> NDArray:
    """Features (n, K) of uint8 images (n, H, W, C)."""
    return images.reshape(len(images), -1) / 255.0


# By sampler, and the factor of the prior samples; None: all samples, at the right scale.
Results = dict[tuple[str, float | None], Result]


Measured = tuple[str, int, Results, dict[str, Images]]


def measure(workdir: Path, num: int, num_of_factor: int, skip: str | None) -> Measured:
    """Method, seed, results, and samples by sampler, of the run in `workdir`.

    Raises:
        ValueError, OSError: there is no finished run in `workdir`, or its data cannot be read.
    """
    run = experiment.load(workdir, fits=False).experiment
    train, results, samples = run.data.get("train"), {}, {}
    real = pixels(channels_last(batch_at(train, slice(len(train))).images))
    real_gaussian, folder = Gaussian.fit(real), evaluation_folder(workdir, "consistency")
    for name, overrides in SAMPLERS[run.config.training.objective].items():
        if skip and name.startswith(skip):
            continue
        trained = experiment.load(workdir, overrides | {"eval.batch_size": 500})
        factors = FACTORS if num_of_factor and name in WITH_WRONG_SCALE else ()
        for factor in (None, *factors):
            number, scale = (num, 1.0) if factor is None else (num_of_factor, factor)
            origin = trained.experiment.origin() | {"num": number, "factor": scale}
            path = folder / f"{name.replace(', ', '_')}_{number}_{scale:g}.npz"
            compute = partial(draw, trained, scale, number)
            result = cached(path, origin, compute, ("samples", "speed"))
            fake = pixels(result["samples"])
            distance = frechet_distance(Gaussian.fit(fake), real_gaussian)
            coverage = precision_recall(real, fake) if factor is None else (np.nan, np.nan)
            results[name, factor] = Result(distance, *coverage, float(result["speed"]))
            samples.setdefault(name, result["samples"][:GRID])
            title = f"{name}, prior times {scale:g}, {number} samples"
            print(f"{workdir} ({run.method.name}): {title}: {distance:.4f}", flush=True)
    return run.method.name, run.seed, results, samples


def mean_and_range(values: list[float], digits: int = 4) -> str:
    """Mean of `values`, and their range."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
    return text


Runs = dict[str, dict[int, Results]]  # by method and seed


def rows_of(runs: Runs) -> Iterator[tuple[str, str, list[Results]]]:
    """Method, sampler, and the results of each seed that has that sampler."""
    for method, of_seeds in runs.items():
        for name in (name for names in SAMPLERS.values() for name in names):
            results = [results for results in of_seeds.values() if (name, None) in results]
            if results:
                yield method, name, results


def print_samplers(runs: Runs) -> None:
    column = ">24"
    table = common.Table(
        ("method", "<20"),
        ("sampler", "<15"),
        ("seeds", ">5"),
        ("distance", column),
        ("/ heun's", column),
        ("precision", column),
        ("recall", column),
        ("images/s", ">9.0f"),
    )
    for method, name, results in rows_of(runs):
        of_sampler = [each[name, None] for each in results]
        baselines = [each[BASELINE, None].distance for each in results if (BASELINE, None) in each]
        distances = [result.distance for result in of_sampler]
        ratios = []
        if len(baselines) == len(distances):
            ratios = [a / b for a, b in zip(distances, baselines, strict=True)]
        table.row(
            method,
            name,
            str(len(results)),
            mean_and_range(distances),
            mean_and_range(ratios, 2) if ratios else "",
            mean_and_range([result.precision for result in of_sampler], 3),
            mean_and_range([result.recall for result in of_sampler], 3),
            float(np.median([result.speed for result in of_sampler])),
        )


def print_factors(runs: Runs) -> None:
    """Print the mean distance at each factor of the prior."""
    columns = [(f"{factor:g}", ">8") for factor in FACTORS]
    table = common.Table(("method", "<20"), ("sampler", "<15"), *columns)
    for method, name, results in rows_of(runs):
        if results := [each for each in results if (name, 1.0) in each]:
            means = [np.mean([each[name, x].distance for each in results]) for x in FACTORS]
            table.row(method, name, *(f"{mean:.4f}" for mean in means))


def plot(runs: Runs, path: str) -> None:
    """Save a PNG: distances against images per second, and against the factor of the prior."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    cost, scale = figure.subplots(1, 2)
    methods = [*runs]
    for method, name, results in rows_of(runs):
        color = f"C{methods.index(method)}"
        of_sampler = [each[name, None] for each in results]
        speed = np.median([result.speed for result in of_sampler])
        distance = np.mean([result.distance for result in of_sampler])
        label = method if name == "consistency, 1" else None
        kind, evaluations = name.split(", ")
        cost.plot(speed, distance, MARKERS[kind], color=color, label=label)
        offset = {"textcoords": "offset points", "fontsize": 8}
        cost.annotate(evaluations, (speed, distance), (5, 4), **offset)
        if results := [each for each in results if (name, 1.0) in each]:
            rows = [[each[name, x].distance for each in results] for x in FACTORS]
            means, lows, highs = zip(*((np.mean(r), min(r), max(r)) for r in rows), strict=True)
            style = "--" if name == BASELINE else "-"
            line = {"color": color, "linestyle": style, "label": f"{method}, {name}"}
            draw_range(scale, FACTORS, means, lows, highs, **line)
    title = "circles: heun, squares: fitted, triangles: consistency, with evaluations"
    cost.set_title(title, fontsize=9)
    cost.set(xscale="log", yscale="log", xlabel="images per second", ylabel="Frechet distance")
    scale.set(xscale="log", yscale="log", xlabel="prior's scale / the right one")
    for axis in (cost, scale):
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = common.options(
        __doc__, "workdirs", num=4000, out=None, grid=None, factors=0, skip=None
    )
    runs, pictures = defaultdict(lambda: defaultdict(dict)), {}
    try:
        for workdir in options.workdirs:
            method, seed, results, samples = measure(
                workdir, options.num, options.factors, options.skip
            )
            runs[method][seed] |= results
            pictures |= samples
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"\n{options.num} samples, {common.setting()}\n")
    print_samplers(runs)
    if options.factors:
        print(
            f"\nFrechet distance of {options.factors} samples from prior samples times a factor\n"
        )
        print_factors(runs)
    if options.out:
        plot(runs, options.out)
    if options.grid:
        grids = [image_grid(pictures[name]) for name in PICTURED if name in pictures]
        framed = [np.pad(grid, ((4, 4), (4, 4), (0, 0)), constant_values=255) for grid in grids]
        save_png(Path(options.grid), np.concatenate(framed, 1))


if __name__ == "__main__":
    main()
