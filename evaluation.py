"""The parts of an evaluation: loss, bits/dim, samples against data, pictures.

Each result is a file that says what it was computed from, so an evaluation that was killed
continues from its files, and several processes can share the work.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import datasets
import distributed
import likelihood
import sampling
from experiment import Experiment
from methods.base import conditioned
from methods.restoration import RESTORE, Measurement, get_operator
from metrics import distances
from metrics.features import FeatureSpace
from metrics.reference import ReferenceStatistics, fingerprint
from metrics.table import OF_HALVES, Comparison, compare, compare_halves
from models.ema import rebuilding_weights
from reports.images import Images, channels_last, image_grid, to_uint8
from reports.progress import progress_bar, solver_bar
from solvers.base import TooManyEvaluations
from sources.batch import Batch
from sources.folder import read_images
from sources.images import cropped_then_resized
from storage.checkpoints import open_checkpoint, written_steps
from storage.checks import loaded
from storage.digests import digests
from storage.files import cached, check_arrays, read_arrays, save_png
from storage.workdir import checkpoint_path
from training import checked_averages

log = logging.getLogger(__name__)

# What can be asked for, in config.eval; the last ones need samples.
DRAWN = ("enable_sampling", "save_images", "enable_interpolate", "enable_rescale")
PARTS = ("enable_loss", "enable_bpd", "enable_classification", *DRAWN)

GRID_SAMPLES = 100  # images of an evaluation that its picture shows
ROWS, COLUMNS = 8, 10  # of the pictures of interpolation and rescaling
CLASS_ROWS = 10  # classes that a picture shows
RESTORATIONS = 5  # of each image
AVERAGED = 2_000  # training images whose mean is a plain restoration
RESTORED = 10  # images that the picture of restorations shows
LARGEST_EMA_ERROR = 0.15  # of the profile; EMA weights err by about a tenth of it
PAIRS = 10  # samples in a row of the picture of nearest training images


def rebuild_ema(
    network: nn.Module, std: float, workdir: Path, checkpoint: Path, content: dict
) -> str:
    """Put the EMA of relative width `std` in place of the weights of a network.

    It is that of the step of `checkpoint`, with this `content`, made of the power-function averages
    in it and in the numbered checkpoints that the run wrote before (see `models.ema`).

    Returns:
        A line on what it was made of.

    Raises:
        ValueError: there are no averages, or too few.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    step = content["step"]
    try:
        stds = [*checked_averages(content, parameters)]
    except ValueError as error:
        raise ValueError(f"eval.ema_std={std}: {checkpoint}: {error}") from error
    paths = {s: checkpoint_path(workdir, s) for s in written_steps(content, checkpoint)}
    paths = {s: p for s, p in paths.items() if s < step and p.exists()}
    paths[step] = checkpoint
    made_of = [(s, each) for s in paths for each in stds]
    weights, error = rebuilding_weights(*zip(*made_of, strict=True), step, std)
    line = (
        f"the EMA of relative width {std:g} from {len(made_of)} averages of {len(paths)} "
        f"checkpoints: its profile errs by {100 * error:.2g} %"
    )
    if error > LARGEST_EMA_ERROR:
        raise ValueError(
            f"eval.ema_std={std}: {line}, which is too much: a width closer to "
            f"{' or '.join(f'{each:g}' for each in stds)} needs fewer checkpoints, and a smaller "
            "training.snapshot_freq makes more"
        )
    rebuilt = [torch.zeros_like(p) for p in parameters]
    for path, each in zip(paths.values(), weights.reshape(-1, len(stds)), strict=True):
        state = content if path == checkpoint else open_checkpoint(path, intact=True)
        averages = checked_averages(state, parameters)
        for width, weight in zip(stds, each.tolist(), strict=True):
            for total, average in zip(rebuilt, averages[width], strict=True):
                average = loaded(average, f"averages of step {state['step']}", total.dtype)
                total.add_(average.to(total.device), alpha=weight)
    with torch.no_grad():
        torch._foreach_copy_(parameters, rebuilt)
    return line


def _origin_of(data) -> dict:
    """Digests of the split that a part is computed on, and of its class labels."""
    return {"data": fingerprint(data)} | digests(labels=getattr(data, "labels", None))


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


def _in_batches(
    desc: str,
    files: Path,
    starts: Sequence[int],
    size: int,
    total: int,
    origin: dict,
    compute: Callable[[int, int], dict],
    spec: Callable[[int, int], dict],
) -> list[dict]:
    """What `compute(i, start)` gives for each of `starts`, kept in {files}_{i}.npz; see `_shared`.

    Batch i is of `size` images, or as many as follow `start` in `total`. `spec(i, number)` tells
    what the file of a batch of `number` images has to hold (see `cached`).
    """
    paths = [files.with_name(f"{files.name}_{i}.npz") for i in range(len(starts))]
    _remove_others(files.parent.glob(f"{files.name}_*.npz"), paths)
    tasks = []
    for i, (start, path) in enumerate(zip(starts, paths, strict=True)):
        number, key = min(size, total - start), origin | {"batch": (i, size)}
        task = partial(cached, path, key, partial(compute, i, start), spec(i, number))
        tasks.append((number, task))
    return _shared(desc, tasks)


def _remove_others(found: Iterable[Path], wanted: list[Path]) -> None:
    """Removes what an earlier evaluation with other numbers left, which would mix with this one."""
    for path in set(found) - set(wanted) if distributed.is_main() else ():
        path.unlink(missing_ok=True)


def evaluate_loss(config, run: Experiment, data, folder: Path, k: int, origin: dict) -> dict:
    """`loss` over a whole split: each image is perturbed once, its batch the reference batch."""

    def compute() -> dict:
        generator = datasets.keyed_generator(run.device, "loss", config.seed)
        net, total = run.network, 0.0
        with progress_bar(total=len(data), desc="loss", unit="image") as progress, torch.no_grad():
            for batch in datasets.in_order(data, config.training.batch_size):
                images = run.codec.encode(datasets.to_unit_interval(batch.images.to(run.device)))
                reference = replace(batch.to(run.device), images=images)
                for some in reference.split(config.eval.batch_size):
                    examples = run.method.draw(some, generator)
                    total += run.objective.loss(net, examples, reference).item() * len(some)
                    progress.update(len(some))
        return {"loss": total / len(data)}

    sizes = {"batch": config.training.batch_size, "at once": config.eval.batch_size}
    training = config.training.to_dict()
    origin = origin | _origin_of(data) | {"sizes": sizes, "training": training}
    path, spec = folder / f"ckpt_{k}_loss.npz", {"loss": ("f", ())}
    return {"loss": cached(path, origin, compute, spec)["loss"]}


def evaluate_bpd(
    config, run: Experiment, bits_per_dim: Callable, data, folder: Path, k: int, origin: dict
) -> dict:
    """Bits per dimension of every image of a split, averaged over passes of new noise.

    They are given the image's class label where there is one, and have no guidance.

    The latents of the first batch are integrated back to images; the root mean square of what that
    changes, in units of [0, 1], is `encoding_error`, and shows what the solver's tolerance costs.

    Returns the report's entries `bpd...` and `encoding_error` (docs/architecture.md), in the main
    process only. Raises FloatingPointError where the ODE cannot be solved.
    """
    split, size, net = config.eval.dataset, config.eval.batch_size, run.network
    passes = config.eval.bpd_num_repeats if split == "test" else 1
    origin = origin | _origin_of(data) | {"divergence": config.eval.divergence}

    @torch.no_grad()
    def compute(i: int, start: int) -> dict:
        generator = datasets.keyed_generator(run.device, "bits/dim", config.seed, i)
        batch = datasets.batch_at(data, slice(start, start + size)).to(run.device)
        images = datasets.to_unit_interval(batch.images, generator, dequantize=True)
        with solver_bar(run.method) as watch:
            bits, latents, nfe = bits_per_dim(
                net, run.codec.encode(images), generator, batch.labels, watch=watch
            )
        found = {"bpd": bits.double().cpu().numpy(), "nfe": nfe}
        if i == 0:
            conditional = conditioned(net, batch.conditions)
            with solver_bar(run.method) as watch:
                x, _ = sampling.solve_ode(
                    run.method, conditional, latents, watch=watch, **run.limits
                )
            change = run.codec.unclamped(x) - images
            found["encoding_error"] = change.square().mean().sqrt().item()
        return found

    def spec(i: int, number: int) -> dict:
        expected = {"bpd": ("f", (number,)), "nfe": ("iuf", ())}
        return expected | ({"encoding_error": ("f", ())} if i == 0 else {})

    starts, files = passes * list(range(0, len(data), size)), folder / f"{split}_ckpt_{k}_bpd"
    batches = _in_batches("bits/dim", files, starts, size, len(data), origin, compute, spec)
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


def evaluate_classification(
    config, run: Experiment, bits_per_dim: Callable, data, folder: Path, k: int, origin: dict
) -> dict:
    """log p(label | image) of every image of a split, by its likelihood given each class label.

    p(label) is the share of the class in the training images. The likelihoods of an image share the
    noise that dequantises it and their probe, so that these do not tell the labels apart.

    Returns the report's entries `accuracy` and `class...` (docs/architecture.md), in the main
    process only. Raises FloatingPointError where the ODE cannot be solved.
    """
    split, size, classes = config.eval.dataset, config.eval.batch_size, config.data.num_classes
    prior = datasets.get_labels(config, "train").bincount(minlength=classes).double()
    dim = math.prod(run.codec.shape)
    origin = origin | _origin_of(data) | {"divergence": config.eval.divergence}
    origin |= {"labels of the training images": prior.tolist()}

    def generator(i: int) -> torch.Generator:
        return datasets.keyed_generator(run.device, "classification", config.seed, i)

    @torch.no_grad()
    def compute(i: int, start: int) -> dict:
        images = datasets.batch_at(data, slice(start, start + size)).images.to(run.device)
        images = datasets.to_unit_interval(images, generator(2 * i), dequantize=True)
        scaled, bits = run.codec.encode(images), []
        for label in range(classes):
            given, probe = (
                torch.full((len(images),), label, device=run.device),
                generator(2 * i + 1),
            )
            with solver_bar(run.method) as watch:
                found, *_ = bits_per_dim(run.network, scaled, probe, given, watch=watch)
            bits.append(found.double().cpu())
        return {"log_p": likelihood.log_posterior(torch.stack(bits, 1), dim, prior).numpy()}

    def spec(i: int, number: int) -> dict:
        return {"log_p": ("f", (number, classes))}

    starts, files = range(0, len(data), size), folder / f"{split}_ckpt_{k}_classes"
    batches = _in_batches("classification", files, starts, size, len(data), origin, compute, spec)
    if not batches:
        return {}
    log_p = np.concatenate([batch["log_p"] for batch in batches])
    return {
        "accuracy": np.mean(log_p.argmax(1) == data.labels.cpu().numpy()),
        "class_log_p": log_p,
        "class_seconds": np.sum([batch["seconds"] for batch in batches]),
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
        "sampling": json.dumps(origin["sampling"], sort_keys=True),
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
        _labels_of(rounds) if config.data.num_classes else None,
        statistics.labels,
    )
    found |= compare(comparison) | _halves(comparison, folder)
    first = np.arange(min(GRID_SAMPLES, len(features)))
    _save_grid(folder / f"ode_images_{k}.png", _samples_at(rounds, first))
    if statistics.data is not None:
        index = torch.from_numpy(statistics.reference.index[: len(first)])
        _save_grid(folder / f"data_images_{k}.png", channels_last(statistics.data[index]))
        _draw_nearest(comparison, statistics.data, rounds, folder / f"nearest_{k}.png")
    return found


def _halves(comparison: Comparison, folder: Path) -> dict:
    """What `compare_halves` finds, kept in the folder, as it is the same for every checkpoint."""
    features = comparison.reference.features
    if features is None or len(features) <= 2 * distances.NEIGHBOURS + 1:
        return {}
    origin = {"data": hashlib.sha256(features.tobytes()).hexdigest()}
    origin |= {"samples": len(comparison.features), "entries": OF_HALVES}
    path, spec = folder / "data_halves.npz", dict.fromkeys(OF_HALVES, ("iuf", ()))
    found = cached(path, origin, partial(compare_halves, comparison), spec)
    return {name: found[name] for name in OF_HALVES}


def _draw_rounds(config, run: Experiment, space, folder: Path, origin: dict) -> list[dict]:
    """The samples in rounds of `eval.batch_size`: `path`, `pool_3`, `logits`, `nfe`, `seconds`.

    A round is two files, its samples and their features, and a kill costs one round at most.
    """
    wanted, size = config.eval.num_samples, config.eval.batch_size
    numbers = _numbers_of_rounds(wanted, size)
    drawn = [folder / f"samples_{r}.npz" for r in range(len(numbers))]
    measured = [folder / f"statistics_{r}.npz" for r in range(len(numbers))]
    _remove_others(folder.glob("*.npz"), [*drawn, *measured])

    channels, *sides = run.codec.shape
    spec = {"samples": ("u", (None, *sides, channels)), "nfe": ("iuf", ())}
    spec |= {"labels": ("i", (None,))} if config.data.num_classes else {}

    def compute(r: int, number: int) -> dict:
        key = origin | {"round": r, "number": number}
        key |= digests(labels=run.draw_labels(number, "samples", r))
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
    """The finite ones of `number` samples, uint8, with their class labels if there are any.

    None where their common solver diverges. Raises TooManyEvaluations: these samples would be
    finite with a larger limit.
    """
    generator = datasets.keyed_generator(run.device, "samples", config.seed, r)
    labels = run.draw_labels(number, "samples", r)
    try:
        with solver_bar(run.method) as watch:
            samples, nfe = run.sampler(
                run.network, number, generator=generator, labels=labels, watch=watch
            )
    except TooManyEvaluations:
        raise
    except FloatingPointError as error:
        log.warning(f"round {r}: none of its {number} samples counts: {error}")
        samples, nfe = torch.empty(0, *run.codec.shape), 0
        labels = None if labels is None else labels[:0]
    finite = samples.flatten(1).isfinite().all(1)
    drawn = {"samples": to_uint8(samples[finite]), "nfe": nfe}
    return drawn if labels is None else drawn | {"labels": labels[finite].cpu().numpy()}


def _labels_of(rounds: list[dict]) -> np.ndarray:
    """The class labels that the samples of the rounds were drawn for, from their files."""
    return np.concatenate([_read_round(drawn, {"labels": "i"})["labels"] for drawn in rounds])


def _read_round(drawn: dict, kinds: dict[str, str]) -> dict:
    """Of the file of a round, the arrays of `kinds`, which have a row for each sample."""
    path, n = drawn["path"], len(drawn["pool_3"])
    rest = {"samples": (None, None, None)}
    spec = {name: (kind, (n, *rest.get(name, ()))) for name, kind in kinds.items()}
    return check_arrays(path, read_arrays(path), spec)


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
        samples = _read_round(rounds[r], {"samples": "u"})["samples"]
        images |= {row: samples[row - ends[r]] for row in rows[round_of == r]}
    return np.stack([images[row] for row in rows])


# --- restoration ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToRestore:
    """What is to be restored.

    Attributes:
        measurement: of n images, in the network's scaling.
        labels: the class labels (n,) of the images, -1 for none; None without classes.
        truth: the images in [0, 1], where they are known.
    """

    measurement: Measurement
    labels: Tensor | None
    truth: Tensor | None


def read_restoration(config, run: Experiment) -> ToRestore:
    """What `sampling.restore` and the keys beside it ask for.

    Raises:
        ValueError: they contradict each other or the data, or an image cannot be read.
        FileNotFoundError: a file does not exist.
    """
    asked, channels, size = config.sampling, config.data.num_channels, config.data.image_size
    name, whole = asked.restore.lower(), asked.restore_degrade
    factor = RESTORE[name]
    if not (asked.restore_path or whole):
        raise ValueError(
            f"sampling.restore={name!r} needs sampling.restore_path, an image or more, or "
            "sampling.restore_degrade for those of the split eval.dataset"
        )
    if size % factor:
        raise ValueError(f"sampling.restore={name!r} does not divide data.image_size={size}")
    if name == "colour" and channels != 3:
        raise ValueError(f"sampling.restore='colour' needs colour images; these have {channels}")
    if name == "denoise" and not asked.restore_noise:
        raise ValueError("sampling.restore='denoise' needs a sampling.restore_noise above 0")
    operator = get_operator(name, _known_pixels(config) if name == "inpaint" else None)
    if not whole:
        channels, size = 1 if name == "colour" else channels, size // factor
    batch = _batch_to_restore(config, channels, size).to(run.device)
    images = datasets.to_unit_interval(batch.images)
    low, high = run.codec.bounds
    noise, value = asked.restore_noise * (high - low), run.codec.encode(images)
    if whole:
        generator = datasets.keyed_generator(run.device, "measurement", config.seed)
        added = operator.forward(value)
        added = torch.randn(added.shape, generator=generator, device=run.device)
        value = operator.forward(value) + noise * added
    if name == "inpaint":
        value = operator.forward(value)  # nothing is known of the other pixels, noise or not
    measurement = Measurement(operator, value, noise)
    _restorer(run, measurement)  # raises what it must
    return ToRestore(measurement, batch.labels, images if whole else None)


def _restorer(run: Experiment, measurement: Measurement) -> sampling.Sampler:
    """The sampler of restorations; its trajectories are not those that levels are fitted to."""
    return replace(run.sampler.without_fit(), measurement=measurement)


def _batch_to_restore(config, channels: int, size: int) -> Batch:
    """uint8 images (n, channels, size, size), and class labels where the network is given any."""
    asked, classes = config.sampling, config.data.num_classes
    if asked.restore_path:
        pictures = read_images("sampling.restore_path", asked.restore_path, channels)
        pictures = np.stack([cropped_then_resized(each, size) for each in pictures.values()])
        batch = Batch(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    else:
        data = datasets.get_dataset(config, config.eval.dataset)
        batch = datasets.batch_at(data, slice(max(1, config.eval.num_samples // RESTORATIONS)))
    if not classes:
        return batch
    if asked.class_label >= 0:
        return replace(batch, labels=torch.full((len(batch),), asked.class_label))
    if batch.labels is not None:
        return batch
    if not config.training.label_dropout:
        raise ValueError(
            "the classes of the images of sampling.restore_path are not known, and the network was "
            "not trained without (training.label_dropout=0): name one as sampling.class_label"
        )
    return replace(batch, labels=torch.full((len(batch),), -1))


def _known_pixels(config) -> Tensor:
    """Those that `sampling.restore_mask` leaves, bool (H, W)."""
    name, size = config.sampling.restore_mask, config.data.image_size
    if not name:
        raise ValueError(
            "sampling.restore='inpaint' needs sampling.restore_mask, an image that is white where "
            "pixels are missing, or top,left,height,width of a rectangle"
        )
    known = torch.ones(size, size, dtype=torch.bool)
    if re.fullmatch(r"\d{1,9}( *, *\d{1,9}){3}", name):
        top, left, height, width = map(int, name.split(","))
        if top + height > size or left + width > size:
            raise ValueError(f"sampling.restore_mask={name} is not within {size} x {size} pixels")
        known[top : top + height, left : left + width] = False
    else:
        first, *_ = read_images("sampling.restore_mask", name, 1).values()
        mask = torch.from_numpy(first[..., 0] >= 128)
        if mask.shape != known.shape:
            found = " x ".join(map(str, mask.shape))
            raise ValueError(
                f"sampling.restore_mask={name} has {found} pixels; the images have {size} x {size}"
            )
        known = ~mask
    if known.all() or not known.any():
        share = "no pixel" if known.all() else "all pixels"
        raise ValueError(f"sampling.restore_mask={name} marks {share} as missing")
    return known


def evaluate_restoration(
    config, run: Experiment, asked: ToRestore, folder: Path, k: int, origin: dict
) -> dict:
    """Draws `RESTORATIONS` images for each measurement, and a picture of the first ones.

    Returns the report's entries `restore...` (docs/architecture.md), in the main process only.
    Raises FloatingPointError where the solver diverges.
    """
    value, labels = asked.measurement.value, asked.labels
    known = asked.measurement.operator.forward(torch.ones(1, *run.codec.shape))
    origin = origin | digests(measurements=value, labels=labels, known=known)
    channels, *sides = run.codec.shape
    size = RESTORATIONS * max(1, config.eval.batch_size // RESTORATIONS)
    repeated = value.repeat_interleave(RESTORATIONS, 0)
    labels = None if labels is None else labels.repeat_interleave(RESTORATIONS)

    def compute(i: int, start: int) -> dict:
        part = slice(start, start + size)
        some = repeated[part]
        sample = _restorer(run, replace(asked.measurement, value=some))
        generator = datasets.keyed_generator(run.device, "restoration", config.seed, i)
        with solver_bar(run.method) as watch:
            images, nfe = sample(
                run.network,
                len(some),
                generator=generator,
                labels=None if labels is None else labels[part],
                watch=watch,
            )
        return {"restored": to_uint8(images), "nfe": nfe}

    def spec(i: int, number: int) -> dict:
        return {"restored": ("u", (number, *sides, channels)), "nfe": ("iuf", ())}

    total, files = len(repeated), folder / f"ckpt_{k}_restored"
    starts = range(0, total, size)
    rounds = _in_batches("restoration", files, starts, size, total, origin, compute, spec)
    if not rounds:
        return {}
    restored = np.concatenate([drawn["restored"] for drawn in rounds])
    restored = restored.reshape(len(value), RESTORATIONS, *sides, channels)
    measured = asked.measurement.operator.adjoint(value) / asked.measurement.operator.gram
    measured = to_uint8(run.codec.decode(measured))
    found = {
        "restore_images": len(value),
        "restore_spread": np.sqrt((restored / 255).var(1, ddof=1).mean()),
        "restore_nfe": np.mean([drawn["nfe"] for drawn in rounds]),
        "restore_seconds": np.sum([drawn["seconds"] for drawn in rounds]),
    }
    columns = [measured[:, None], restored]
    if asked.truth is not None:
        truth = to_uint8(asked.truth)[:, None]
        columns = [truth, *columns]
        found["restore_psnr"] = _psnr(restored, truth)
        found["restore_psnr_mean"] = _psnr(restored.mean(1, keepdims=True), truth)
        plain = to_uint8(run.codec.decode(_plain_restoration(config, run, asked.measurement)))
        found["restore_psnr_plain"] = _psnr(plain[:, None], truth)
    shown = np.concatenate(columns, axis=1)[:RESTORED]
    path = folder / f"restoration_{k}.png"
    _save_grid(path, shown.reshape(-1, *sides, channels), columns=shown.shape[1])
    return found


def _plain_restoration(config, run: Experiment, measurement: Measurement) -> Tensor:
    """Restorations (n, C, H, W) that need no network, to compare with.

    Small images are enlarged by cubic interpolation; else it is the mean training image, changed so
    that it agrees with the measurement.
    """
    value, (channels, height, width) = measurement.value, run.codec.shape
    if value.shape[2:] != (height, width):
        return torch.nn.functional.interpolate(value, (height, width), mode="bicubic")
    try:
        data = datasets.get_dataset(config, "train", labels=False)
    except (OSError, ValueError) as error:  # published networks restore without their data
        log.warning(f"the plain restorations start from grey, not the mean image: {error}")
        mean = run.codec.encode(torch.tensor(0.5)).expand(channels, height, width)
    else:
        batch = datasets.batch_at(data, slice(AVERAGED))
        mean = run.codec.encode(datasets.to_unit_interval(batch.images)).mean(0)
    return measurement.project(mean.to(value).expand(len(value), -1, -1, -1))


def _psnr(images: np.ndarray, truth: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio, dB, of `images` (n, k, H, W, C) in grey levels of 255.

    The squared error counts as at least that of rounding, 1 / 12.
    """
    error = np.square(images - truth.astype(np.float64)).mean((2, 3, 4))
    return (10 * np.log10(255**2 / np.maximum(error, 1 / 12))).mean()


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
    """Each row, of one class, goes from one prior sample to another along the arc between them."""
    shape = 2 * ROWS, *run.codec.shape
    generator = datasets.keyed_generator(run.device, "interpolation", config.seed)
    ends = run.method.prior_sampling(shape, generator, run.device)
    shares = torch.linspace(0, 1, COLUMNS, device=run.device)
    x = sampling.spherical_interpolation(*ends.chunk(2), shares).flatten(0, 1)
    _draw_strips(run, x, folder / f"interpolation_{k}.png", generator)


def draw_classes(config, run: Experiment, folder: Path, k: int) -> None:
    """A row for each class, at most `CLASS_ROWS`; each column starts from one prior sample.

    Without classes, or where `sampling.class_label` asks for one, there is no such picture.
    """
    if not config.data.num_classes or config.sampling.class_label >= 0:
        return
    rows, shape = min(config.data.num_classes, CLASS_ROWS), run.codec.shape
    generator = datasets.keyed_generator(run.device, "classes", config.seed)
    x = run.method.prior_sampling((COLUMNS, *shape), generator, run.device).repeat(rows, 1, 1, 1)
    labels = torch.arange(rows, device=run.device)
    _draw_strips(run, x, folder / f"classes_{k}.png", generator, labels)


def draw_rescaling(config, run: Experiment, folder: Path, k: int) -> None:
    """Each row keeps the direction of one prior sample and raises its norm (the temperature)."""
    shape = run.codec.shape
    generator = datasets.keyed_generator(run.device, "rescaling", config.seed)
    x = run.method.prior_sampling((ROWS, *shape), generator, run.device)
    low, high = config.eval.rescale_norms or run.method.prior_norms(math.prod(shape))
    norms = torch.linspace(low, high, COLUMNS, device=run.device)
    direction = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = (direction[:, None] * norms.view(1, -1, 1, 1, 1)).flatten(0, 1)
    _draw_strips(run, x, folder / f"rescale_{k}.png", generator)


def _draw_strips(
    run: Experiment,
    x: Tensor,
    path: Path,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> None:
    """Rows of `COLUMNS` samples from `x`; a row has one of `labels`, which are drawn if None."""
    if labels is None:
        labels = run.draw_labels(len(x) // COLUMNS, "rows")
    labels = None if labels is None else labels.repeat_interleave(COLUMNS)
    try:
        with solver_bar(run.method) as watch:
            samples, _ = run.sampler(
                run.network, x=x, generator=generator, labels=labels, watch=watch
            )
    except FloatingPointError as error:
        log.warning(f"{path} is not drawn: {error}")
    else:
        _save_grid(path, to_uint8(samples), COLUMNS)


def _save_grid(path: Path, images: Images, columns: int | None = None) -> None:
    save_png(path, image_grid(images, columns))
    log.info(f"picture: {path}")
