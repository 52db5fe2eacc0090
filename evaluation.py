"""The parts of an evaluation: loss, bits/dim, samples against data, pictures.

Each result is a file that says what it was computed from, so an evaluation that was killed
continues from its files, and several processes can share the work.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import datasets
import distributed
import sampling
from experiment import Experiment, progress_bar, solver_bar
from metrics import distances
from metrics.features import FeatureSpace
from metrics.reference import ReferenceStatistics, fingerprint
from metrics.table import Comparison, compare
from reports.images import Images, channels_last, image_grid, to_uint8
from solvers import Schedule, fitted
from solvers.base import TooManyEvaluations
from storage.checkpoints import fitted_path
from storage.files import cached, check_arrays, read_arrays, save_png

log = logging.getLogger(__name__)

# What can be asked for, in config.eval; the last ones need samples.
DRAWN = ("enable_sampling", "save_images", "enable_interpolate", "enable_rescale")
PARTS = ("enable_loss", "enable_bpd", *DRAWN)

GRID_SAMPLES = 100  # images of an evaluation that its picture shows
ROWS, COLUMNS = 8, 10  # of the pictures of interpolation and rescaling
PAIRS = 10  # samples in a row of the picture of nearest training images


def origin_of(config, run: Experiment) -> dict:
    """What every part of an evaluation depends on, in words that can be compared."""
    weights = hashlib.sha256()
    for name, tensor in run.state.model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "weights": weights.hexdigest(),
        "network": config.model.to_dict(),
        "method": repr(run.method),
        "sampling": config.sampling.to_dict(),
        "centered": config.data.centered,
        "seed": config.seed,
        "precision": config.training.precision,
        "device": run.device.type,
    }


def fit_sampler(config, run: Experiment, checkpoint: Path, origin: dict) -> Callable:
    """`run.sample`, its schedule that of `fit_schedule` if `config` asks for it and for samples."""
    asked = config.sampling
    if asked.method != "ode" or asked.schedule != "fitted" or not any(map(config.eval.get, DRAWN)):
        return run.sample
    return partial(run.sample, schedule=fit_schedule(config, run, checkpoint, origin))


def fit_schedule(config, run: Experiment, checkpoint: Path, origin: dict) -> Schedule:
    """The schedule fitted to the weights that `run` holds (see `solvers.fitted`).

    What is measured of the network's trajectories is kept beside the `checkpoint`, in a file that
    counts for these weights and this ODE; levels of any number of steps are made of it.
    """
    follow = sampling.get_sampling_fn(sampling.for_trajectories(config), run.method)
    shape = datasets.image_shape(config)
    number = fitted.number_of_trajectories(math.prod(shape))

    def compute() -> dict:
        log.info(f"fitting the noise levels to {number} trajectories")
        generator = datasets.keyed_generator(run.device, "fitted", config.seed)
        x = run.method.prior_sampling((number, *shape), generator, run.device)
        sums = []
        for some in x.split(fitted.at_once(math.prod(shape))):
            steps = []
            with solver_bar(run.method) as watch:
                follow(
                    run.state.model,
                    x=some,
                    callback=steps.append,
                    watch=watch,
                    schedule=fitted.fine_levels,
                )
            sums.append(fitted.euler_errors(steps))
        levels = np.array([step.level for step in steps])
        cost = fitted.step_costs(*map(sum, zip(*sums, strict=True)))
        return {"levels": levels, "cost": cost.numpy()}

    ours = sampling.for_trajectories(config).sampling.to_dict()
    path, k = fitted_path(checkpoint), fitted.FINE_STEPS + 1
    spec = {"levels": ("f", (k,)), "cost": ("f", (k, k))}
    key = origin | {"sampling": ours, "trajectories": number}
    if distributed.is_main():
        cached(path, key, compute, spec)
    distributed.barrier()
    found = cached(path, key, compute, spec)
    levels, cost = (torch.from_numpy(found[name]) for name in ("levels", "cost"))
    return partial(fitted.schedule, levels, cost)


def _shared(desc: str, tasks: Sequence[tuple[int, Callable[[], dict]]]) -> list[dict]:
    """What all `tasks` give, each with its number of images; in another than the main process [].

    Each process does its share of them. They meet in the files of `cached`; where they cannot, the
    main process does again what it does not find.
    """
    mine = tasks[distributed.rank() :: distributed.world()]
    results = []
    with progress_bar(total=sum(n for n, _ in mine), desc=desc, unit="image") as progress:
        for images, task in mine:
            results.append(task())
            progress.update(images)
    if distributed.world() == 1:
        return results
    distributed.barrier()
    return [task() for _, task in tasks] if distributed.is_main() else []


def remove_results(folder: Path, k: int) -> None:
    """Removes the report and the pictures of checkpoint `k`, which are to be made anew."""
    for path in (folder / f"report_{k}.npz", *folder.glob(f"*_{k}.png")):
        path.unlink(missing_ok=True)


def _remove_others(found: Iterable[Path], wanted: list[Path]) -> None:
    """Removes what an earlier evaluation with other numbers left, which would mix with this one."""
    for path in set(found) - set(wanted) if distributed.is_main() else ():
        path.unlink(missing_ok=True)


def evaluate_loss(config, run: Experiment, data, folder: Path, k: int, origin: dict) -> dict:
    """`loss` over a whole split: each image is perturbed once, its batch the reference batch."""

    def compute() -> dict:
        generator = datasets.keyed_generator(run.device, "loss", config.seed)
        net, total = run.state.model, 0.0
        with progress_bar(total=len(data), desc="loss", unit="image") as progress, torch.no_grad():
            for batch in datasets.in_order(data, config.training.batch_size):
                images = run.scaler(datasets.to_unit_interval(batch.images.to(run.device)))
                reference = replace(batch.to(run.device), images=images)
                for some in reference.split(config.eval.batch_size):
                    examples = run.method.draw(some, generator)
                    total += run.loss.error(net, examples, reference).item() * len(some)
                    progress.update(len(some))
        return {"loss": total / len(data)}

    sizes = {"batch": config.training.batch_size, "at once": config.eval.batch_size}
    training = config.training.to_dict()
    origin = origin | {"data": fingerprint(data), "sizes": sizes, "training": training}
    path, spec = folder / f"ckpt_{k}_loss.npz", {"loss": ("f", ())}
    return {"loss": cached(path, origin, compute, spec)["loss"]}


def evaluate_bpd(
    config, run: Experiment, bits_per_dim: Callable, data, folder: Path, k: int, origin: dict
) -> dict:
    """Bits per dimension of every image of a split, averaged over passes of new noise.

    The latents of the first batch are integrated back to images; the root mean square of what that
    changes, in units of [0, 1], is `encoding_error`, and shows what the solver's tolerance costs.

    Returns the report's entries `bpd...` and `encoding_error` (docs/architecture.md), in the main
    process only. Raises FloatingPointError where the ODE cannot be solved.
    """
    split, size, net = config.eval.dataset, config.eval.batch_size, run.state.model
    passes = config.eval.bpd_num_repeats if split == "test" else 1
    origin = origin | {"data": fingerprint(data), "divergence": config.eval.divergence}

    @torch.no_grad()
    def compute(i: int, start: int) -> dict:
        generator = datasets.keyed_generator(run.device, "bits/dim", config.seed, i)
        images = data[start : start + size].to(run.device)
        images = datasets.to_unit_interval(images, generator, dequantize=True)
        with solver_bar(run.method) as watch:
            bits, latents, nfe = bits_per_dim(net, run.scaler(images), generator, watch=watch)
        found = {"bpd": bits.double().cpu().numpy(), "nfe": nfe}
        if i == 0:
            options = sampling.get_rk45_options(config)
            x, _ = sampling.solve_ode(run.method, net, latents, **options)
            change = datasets.get_data_inverse_scaler(config)(x) - images
            found["encoding_error"] = change.square().mean().sqrt().item()
        return found

    starts = passes * list(range(0, len(data), size))
    paths = [folder / f"{split}_ckpt_{k}_bpd_{i}.npz" for i in range(len(starts))]
    _remove_others(folder.glob(f"{split}_ckpt_{k}_bpd_*.npz"), paths)
    tasks = []
    for i, (start, path) in enumerate(zip(starts, paths, strict=True)):
        number = min(size, len(data) - start)
        spec = {"bpd": ("f", (number,)), "nfe": ("iuf", ())}
        spec |= {"encoding_error": ("f", ())} if i == 0 else {}
        key = origin | {"batch": (i, size)}
        tasks.append((number, partial(cached, path, key, partial(compute, i, start), spec)))
    batches = _shared("bits/dim", tasks)
    if not batches:
        return {}
    bpd = np.concatenate([batch["bpd"] for batch in batches]).reshape(passes, len(data)).mean(0)
    return {
        "bpd": bpd.mean(),
        "bpd_error": bpd.std(ddof=1) / math.sqrt(len(bpd)),
        "bpd_nfe": np.mean([batch["nfe"] for batch in batches]),
        "bpd_seconds": np.sum([batch["seconds"] for batch in batches]),
        "bpd_images": bpd,
        "encoding_error": batches[0]["encoding_error"],
    }


def evaluate_samples(
    config, run: Experiment, statistics: ReferenceStatistics, folder: Path, k: int, origin: dict
) -> dict:
    """Draws `eval.num_samples` samples and compares their features with those of the data.

    Returns the report's entries on samples (docs/architecture.md), in the main process only.
    """
    wanted, space = config.eval.num_samples, statistics.space
    rounds = _draw_rounds(config, run, space, folder / f"ckpt_{k}", origin)
    if not rounds:
        return {}
    features = np.concatenate([drawn["pool_3"] for drawn in rounds])
    logits = [drawn["logits"] for drawn in rounds if "logits" in drawn]
    found = {
        "features": config.eval.features,
        "num_samples": len(features),
        "nonfinite": wanted - len(features),
        "nfe": np.mean([drawn["nfe"] for drawn in rounds if len(drawn["pool_3"])] or [math.nan]),
        "sampling_seconds": np.sum([drawn["seconds"] for drawn in rounds]),
    }
    if found["nonfinite"]:
        log.warning(f"{found['nonfinite']} of {wanted} samples are not finite and do not count")
    if len(features) <= distances.NEIGHBOURS:
        log.warning(f"{len(features)} finite samples are too few to be compared with the data")
        return found
    log.info(f"comparing {len(features):,} samples with the data")
    comparison = Comparison(
        features,
        np.concatenate(logits) if logits else None,
        statistics.reference,
        space.backend,
        run.device if run.device.type == "cuda" else torch.device("cpu"),  # for float64
    )
    found |= compare(comparison)
    first = np.arange(min(GRID_SAMPLES, len(features)))
    _save_grid(folder / f"ode_images_{k}.png", _samples_at(rounds, first))
    if statistics.data is not None:
        _draw_nearest(comparison, statistics.data, rounds, folder / f"nearest_{k}.png")
    return found


def _draw_rounds(config, run: Experiment, space, folder: Path, origin: dict) -> list[dict]:
    """The samples in rounds of `eval.batch_size`: `path`, `pool_3`, `logits`, `nfe`, `seconds`.

    A round is two files, its samples and their features, and a kill costs one round at most.
    """
    wanted, size = config.eval.num_samples, config.eval.batch_size
    numbers = _numbers_of_rounds(wanted, size)
    drawn = [folder / f"samples_{r}.npz" for r in range(len(numbers))]
    measured = [folder / f"statistics_{r}.npz" for r in range(len(numbers))]
    _remove_others(folder.glob("*.npz"), [*drawn, *measured])

    channels, *sides = datasets.image_shape(config)
    spec = {"samples": ("u", (None, *sides, channels)), "nfe": ("iuf", ())}

    def compute(r: int, number: int) -> dict:
        key = origin | {"round": r, "number": number}
        samples = cached(drawn[r], key, partial(_draw_round, config, run, r, number), spec)
        key |= {"features": space.name}
        images = samples["samples"]
        features = partial(_features, space, images)
        features = cached(measured[r], key, features, space.spec(len(images)))
        cost = {"nfe": samples["nfe"], "seconds": samples["seconds"]}
        return features | cost | {"path": drawn[r]}

    tasks = [(number, partial(compute, r, number)) for r, number in enumerate(numbers)]
    return _shared("sampling", tasks)


def _numbers_of_rounds(wanted: int, size: int) -> list[int]:
    return [min(size, wanted - first) for first in range(0, wanted, size)]


def _draw_round(config, run: Experiment, r: int, number: int) -> dict:
    """The finite ones of `number` samples, uint8; none where their common solver diverges.

    Raises TooManyEvaluations: these samples would be finite with a larger limit.
    """
    generator = datasets.keyed_generator(run.device, "samples", config.seed, r)
    try:
        with solver_bar(run.method) as watch:
            samples, nfe = run.sample(run.state.model, number, generator=generator, watch=watch)
    except TooManyEvaluations:
        raise
    except FloatingPointError as error:
        log.warning(f"round {r}: none of its {number} samples counts: {error}")
        samples, nfe = torch.empty(0, *datasets.image_shape(config)), 0
    finite = samples.flatten(1).isfinite().all(1)
    return {"samples": to_uint8(samples[finite]), "nfe": nfe}


def _features(space: FeatureSpace, images: Images) -> dict:
    if not len(images):
        return {name: np.empty(shape, np.float32) for name, (_, shape) in space.spec(0).items()}
    pool_3, logits = space(images)
    return {"pool_3": pool_3} if logits is None else {"pool_3": pool_3, "logits": logits}


def _samples_at(rounds: list[dict], rows: np.ndarray) -> Images:
    """The samples number `rows`, from the files of the rounds, each of which is read once."""
    ends = np.cumsum([len(drawn["pool_3"]) for drawn in rounds])
    round_of = np.searchsorted(ends, rows, side="right")
    images = {}
    for r in np.unique(round_of):
        path, n = rounds[r]["path"], len(rounds[r]["pool_3"])
        spec = {"samples": ("u", (n, None, None, None))}
        samples = check_arrays(path, read_arrays(path), spec)["samples"]
        images |= {row: samples[row - ends[r]] for row in rows[round_of == r]}
    return np.stack([images[row] for row in rows])


# --- pictures ------------------------------------------------------------------------------------


def _draw_nearest(comparison: Comparison, data, rounds: list[dict], path: Path) -> None:
    """Samples, and below each the training image nearest to it, to look for copies.

    First those samples that are closest to the data, then the first ones drawn.
    """
    found, rows = comparison.nearest
    number = min(PAIRS, len(found))
    strips = []
    for shown in (found.argsort()[:number], np.arange(number)):
        index = torch.from_numpy(comparison.reference.index[rows[shown]])
        pairs = np.concatenate([_samples_at(rounds, shown), channels_last(data[index])])
        strips.append(image_grid(pairs, columns=number))
    save_png(path, np.concatenate(strips))


def draw_images(config, run: Experiment, folder: Path, k: int) -> None:
    """Some samples, for the eye only."""
    wanted = min(GRID_SAMPLES, config.eval.num_samples)
    numbers = enumerate(_numbers_of_rounds(wanted, config.eval.batch_size))
    samples = np.concatenate([_draw_round(config, run, r, n)["samples"] for r, n in numbers])
    if len(samples):
        _save_grid(folder / f"ode_images_{k}.png", samples)


def draw_interpolation(config, run: Experiment, folder: Path, k: int) -> None:
    """Each row goes from one prior sample to another along the arc between them."""
    shape = 2 * ROWS, *datasets.image_shape(config)
    generator = datasets.keyed_generator(run.device, "interpolation", config.seed)
    ends = run.method.prior_sampling(shape, generator, run.device)
    shares = torch.linspace(0, 1, COLUMNS, device=run.device)
    x = sampling.spherical_interpolation(*ends.chunk(2), shares).flatten(0, 1)
    _draw_strips(run, x, folder / f"interpolation_{k}.png", generator)


def draw_rescaling(config, run: Experiment, folder: Path, k: int) -> None:
    """Each row keeps the direction of one prior sample and raises its norm (the temperature)."""
    shape = datasets.image_shape(config)
    generator = datasets.keyed_generator(run.device, "rescaling", config.seed)
    x = run.method.prior_sampling((ROWS, *shape), generator, run.device)
    low, high = config.eval.rescale_norms or run.method.prior_norms(math.prod(shape))
    norms = torch.linspace(low, high, COLUMNS, device=run.device)
    direction = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = (direction[:, None] * norms.view(1, -1, 1, 1, 1)).flatten(0, 1)
    _draw_strips(run, x, folder / f"rescale_{k}.png", generator)


def _draw_strips(run: Experiment, x: Tensor, path: Path, generator: torch.Generator) -> None:
    try:
        with solver_bar(run.method) as watch:
            samples, _ = run.sample(run.state.model, x=x, generator=generator, watch=watch)
    except FloatingPointError as error:
        log.warning(f"{path} is not drawn: {error}")
    else:
        _save_grid(path, to_uint8(samples), COLUMNS)


def _save_grid(path: Path, images: Images, columns: int | None = None) -> None:
    save_png(path, image_grid(images, columns))
    log.info(f"picture: {path}")
