"""The parts of an evaluation: loss, bits/dim, samples against data, pictures, the page.

A part is a file that knows what it came from, so that an evaluation can be killed and gone on with,
and several processes can share one.
"""

import hashlib
import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import datasets
import distributed
import metrics
import sampling
from checkpoints import atomic_write
from experiment import Experiment, progress_bar
from features import FeatureSpace, Judge, data_name, fingerprint, read_arrays
from report import Images, Picture, format_table, image_grid, render
from workdir import read_scalars, save_npz, save_png

log = logging.getLogger(__name__)

# What can be asked for, in config.eval.
PARTS = (
    "enable_loss",
    "enable_bpd",
    "enable_sampling",
    "save_images",
    "enable_interpolate",
    "enable_rescale",
)

GRID_SAMPLES = 100  # images of an evaluation that its picture shows
STRIPS = (8, 10)  # rows and columns of the pictures of interpolation and rescaling
PAIRS = 10  # samples in a row of the picture of nearest training images
DISTANCES_KEPT = 5_000  # training images whose own nearest neighbours are looked for
PAGE_PIXELS = 1400  # side of the largest picture in report.html


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


def _once(path: Path, origin: dict, compute: Callable[[], dict]) -> dict:
    """The arrays that `compute` gives, from `path` where they are there and of this `origin`."""
    words = json.dumps(origin, sort_keys=True, default=str)
    found = _read_if_whole(path)
    if str(found.get("origin")) != words:
        start = time.perf_counter()
        found = compute()
        found |= {"seconds": time.perf_counter() - start, "origin": words}
        save_npz(path, **found)
    return found


def _shared(desc: str, tasks: Sequence[tuple[int, Callable[[], dict]]]) -> list[dict]:
    """What all `tasks` give, each with its number of images; in another than the main process [].

    Each process does its share of them. They meet in the files of `_once`; where they cannot, the
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


def _read_if_whole(path: Path) -> dict:
    """The arrays at `path`; none where it does not exist, or is damaged, of which the log tells."""
    try:
        return read_arrays(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning(f"{error}; it is not used")
        return {}


def _remove_others(found: Iterable[Path], wanted: list[Path]) -> None:
    """Removes what an earlier evaluation with other numbers left, which would mix with this one."""
    for path in set(found) - set(wanted) if distributed.is_main() else ():
        path.unlink(missing_ok=True)


def evaluate_loss(config, run: Experiment, data, folder: Path, k: int, origin: dict) -> dict:
    """`loss` over a whole split: each image perturbed once in the field of its large batch."""

    def compute() -> dict:
        generator = datasets.keyed_generator(run.device, "loss", config.seed)
        net, total = run.state.model, 0.0
        with progress_bar(total=len(data), desc="loss", unit="image") as progress, torch.no_grad():
            for block in datasets.in_order(data, config.training.batch_size):
                charges = run.scaler(datasets.to_unit_interval(block.images.to(run.device)))
                for batch in charges.split(config.eval.batch_size):
                    total += run.loss_fn(net, batch, generator, charges).item() * len(batch)
                    progress.update(len(batch))
        return {"loss": total / len(data)}

    sizes = {"batch": config.training.batch_size, "at once": config.eval.batch_size}
    training = config.training.to_dict()
    origin = origin | {"data": fingerprint(data), "sizes": sizes, "training": training}
    return {"loss": _once(folder / f"ckpt_{k}_loss.npz", origin, compute)["loss"]}


def evaluate_bpd(
    config, run: Experiment, bits_per_dim: Callable, data, folder: Path, k: int, origin: dict
) -> dict:
    """Bits per dimension of every image of a split, averaged over passes of new noise.

    The latents of the first batch are carried back to images; how far these are from where they
    came, `encoding_error`, shows what the solver's tolerance costs.

    Returns:
        The entries `bpd...` and `encoding_error` of the report (docs/architecture.md); nothing in
        another than the main process.

    Raises:
        FloatingPointError: the ODE cannot be solved.
    """
    split, size = config.eval.dataset, config.eval.batch_size
    passes = config.eval.bpd_num_repeats if split == "test" else 1
    origin = origin | {"data": fingerprint(data), "divergence": config.eval.divergence}

    def compute(i: int, start: int) -> dict:
        generator = datasets.keyed_generator(run.device, "bits/dim", config.seed, i)
        images = data[start : start + size].to(run.device)
        images = datasets.to_unit_interval(images, generator, dequantize=True)
        bits, latents, nfe = bits_per_dim(run.state.model, run.scaler(images), generator)
        found = {"bpd": bits.double().cpu().numpy(), "nfe": nfe}
        if i == 0:
            found["encoding_error"] = _encoding_error(config, run, latents, images)
        return found

    starts = passes * list(range(0, len(data), size))
    paths = [folder / f"{split}_ckpt_{k}_bpd_{i}.npz" for i in range(len(starts))]
    _remove_others(folder.glob(f"{split}_ckpt_{k}_bpd_*.npz"), paths)
    parts = _shared(
        "bits/dim",
        [
            (
                min(size, len(data) - start),
                partial(_once, path, origin | {"batch": (i, size)}, partial(compute, i, start)),
            )
            for i, (start, path) in enumerate(zip(starts, paths, strict=True))
        ],
    )
    if not parts:
        return {}
    bpd = np.concatenate([part["bpd"] for part in parts]).reshape(passes, len(data)).mean(0)
    return {
        "bpd": bpd.mean(),
        "bpd_error": bpd.std(ddof=1) / math.sqrt(len(bpd)),
        "bpd_nfe": np.mean([part["nfe"] for part in parts]),
        "bpd_seconds": np.sum([part["seconds"] for part in parts]),
        "bpd_images": bpd,
        "encoding_error": parts[0]["encoding_error"],
    }


@torch.no_grad()
def _encoding_error(config, run: Experiment, latents: Tensor, images: Tensor) -> float:
    """Root mean square of what the way to the latents and back changes, in units of [0, 1]."""
    tolerances = sampling.get_tolerances(config)
    x, _ = sampling.solve_ode(run.method, run.state.model, latents, **tolerances)
    back = datasets.get_data_inverse_scaler(config)(x)
    return (back - images).square().mean().sqrt().item()


def evaluate_samples(
    config, run: Experiment, judge: Judge, folder: Path, k: int, origin: dict
) -> dict:
    """Draws `eval.num_samples` samples and compares their features with those of the data.

    Returns:
        The report's entries on samples, from `fid` to `sampling_seconds` (docs/architecture.md);
        nothing in another than the main process.
    """
    wanted = config.eval.num_samples
    rounds = _draw_rounds(config, run, judge.space, folder / f"ckpt_{k}", origin)
    if not rounds:
        return {}
    features = np.concatenate([part["pool_3"] for part in rounds])
    logits = [part["logits"] for part in rounds if "logits" in part]
    found = {
        "features": config.eval.features,
        "num_samples": len(features),
        "nonfinite": wanted - len(features),
        "nfe": np.mean([part["nfe"] for part in rounds if len(part["pool_3"])] or [math.nan]),
        "sampling_seconds": np.sum([part["seconds"] for part in rounds]),
    }
    if found["nonfinite"]:
        log.warning(f"{found['nonfinite']} of {wanted} samples are not finite and do not count")
    if len(features) <= metrics.NEIGHBOURS:
        log.warning(f"{len(features)} finite samples are too few to be compared with the data")
        return found
    log.info(f"comparing {len(features):,} samples with the data")
    logits = np.concatenate(logits) if logits else None
    device = run.device if run.device.type == "cuda" else torch.device("cpu")  # for float64
    found |= metrics.compare(features, logits, judge.reference, judge.space.metrics, device)
    first = np.arange(min(GRID_SAMPLES, len(features)))
    _save_grid(folder / f"ode_images_{k}.png", _samples_at(rounds, first))
    if judge.data is not None:
        found |= _draw_nearest(judge, rounds, features, folder / f"nearest_{k}.png", device)
    return found


def _draw_rounds(config, run: Experiment, space, folder: Path, origin: dict) -> list[dict]:
    """The samples in rounds of `eval.batch_size`: `path`, `pool_3`, `logits`, `nfe`, `seconds`.

    A round is two files, its samples and their features, and a kill costs one round at most.
    """
    wanted, size = config.eval.num_samples, config.eval.batch_size
    numbers = [min(size, wanted - first) for first in range(0, wanted, size)]
    drawn = [folder / f"samples_{r}.npz" for r in range(len(numbers))]
    measured = [folder / f"statistics_{r}.npz" for r in range(len(numbers))]
    _remove_others(folder.glob("*.npz"), [*drawn, *measured])

    def compute(r: int, number: int) -> dict:
        key = origin | {"round": r, "number": number}
        samples = _once(drawn[r], key, partial(_draw_round, config, run, r, number))
        key |= {"features": space.name}
        features = _once(measured[r], key, partial(_features, space, samples["samples"]))
        cost = {"nfe": samples["nfe"], "seconds": samples["seconds"]}
        return features | cost | {"path": drawn[r]}

    tasks = [(number, partial(compute, r, number)) for r, number in enumerate(numbers)]
    return _shared("sampling", tasks)


def _draw_round(config, run: Experiment, r: int, number: int) -> dict:
    """The finite ones of `number` samples, uint8; none where their common solver diverges."""
    generator = datasets.keyed_generator(run.device, "samples", config.seed, r)
    try:
        samples, nfe = run.sample(run.state.model, number, generator=generator)
    except FloatingPointError as error:
        log.warning(f"round {r}: none of its {number} samples counts: {error}")
        size = config.data.image_size
        samples, nfe = torch.empty(0, config.data.num_channels, size, size), 0
    finite = samples.flatten(1).isfinite().all(1)
    return {"samples": to_uint8(samples[finite]), "nfe": nfe}


def _features(space: FeatureSpace, images: Images) -> dict:
    if not len(images):
        return {"pool_3": np.empty((0, space.width), np.float32)}
    pool_3, logits = space(images)
    return {"pool_3": pool_3} if logits is None else {"pool_3": pool_3, "logits": logits}


def _samples_at(rounds: list[dict], rows: np.ndarray) -> Images:
    """The samples number `rows`, from the files of the rounds, each of which is read once."""
    ends = np.cumsum([len(part["pool_3"]) for part in rounds])
    round_of = np.searchsorted(ends, rows, side="right")
    images = {}
    for r in np.unique(round_of):
        samples = read_arrays(rounds[r]["path"])["samples"]
        images |= {row: samples[row - ends[r]] for row in rows[round_of == r]}
    return np.stack([images[row] for row in rows])


# --- pictures and pages ---------------------------------------------------------------------------


def _draw_nearest(
    judge: Judge, rounds: list[dict], features: np.ndarray, path: Path, device
) -> dict:
    """Looks for copies: how far samples are from the training images nearest to them.

    The picture has samples with their nearest training images below: first those samples that are
    closest to the data, then the first ones drawn. For comparison, training images are measured
    against all the other ones.
    """
    reference, number = judge.reference, min(PAIRS, len(features))
    distances, found = metrics.nearest(features, reference.features, 1, device)
    some = reference.features[:DISTANCES_KEPT]
    among_data = metrics.nearest(some, reference.features, 2, device)[0][:, 1]
    strips = []
    for shown in (distances[:, 0].argsort()[:number], np.arange(number)):
        index = torch.from_numpy(reference.index[found[shown, 0]])
        pairs = np.concatenate([_samples_at(rounds, shown), _nhwc(judge.data[index])])
        strips.append(image_grid(pairs, columns=number))
    save_png(path, np.concatenate(strips))
    return {"nearest": np.median(distances), "nearest_data": np.median(among_data)}


def draw_images(config, run: Experiment, folder: Path, k: int) -> None:
    """Some samples, for the eye only."""
    number = min(GRID_SAMPLES, config.eval.batch_size)
    samples = _draw_round(config, run, 0, number)["samples"]
    if len(samples):
        _save_grid(folder / f"ode_images_{k}.png", samples)


def draw_interpolation(config, run: Experiment, folder: Path, k: int) -> None:
    """Each row goes from one prior sample to another along the arc between them."""
    shape = (config.data.num_channels, config.data.image_size, config.data.image_size)
    generator = datasets.keyed_generator(run.device, "interpolation", config.seed)
    ends = run.method.prior_sampling((2 * STRIPS[0], *shape), generator, run.device)
    shares = torch.linspace(0, 1, STRIPS[1], device=run.device)
    x = sampling.spherical_interpolation(*ends.chunk(2), shares).flatten(0, 1)
    _draw_strips(run, x, folder / f"interpolation_{k}.png", generator)


def draw_rescaling(config, run: Experiment, folder: Path, k: int) -> None:
    """Each row keeps the direction of one prior sample and raises its norm (the temperature)."""
    shape = (config.data.num_channels, config.data.image_size, config.data.image_size)
    generator = datasets.keyed_generator(run.device, "rescaling", config.seed)
    x = run.method.prior_sampling((STRIPS[0], *shape), generator, run.device)
    low, high = config.eval.rescale_norms or run.method.prior_norms(math.prod(shape))
    norms = torch.linspace(low, high, STRIPS[1], device=run.device)
    direction = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = (direction[:, None] * norms.view(1, -1, 1, 1, 1)).flatten(0, 1)
    _draw_strips(run, x, folder / f"rescale_{k}.png", generator)


def _draw_strips(run: Experiment, x: Tensor, path: Path, generator: torch.Generator) -> None:
    try:
        samples, _ = run.sample(run.state.model, x=x, generator=generator)
    except FloatingPointError as error:
        log.warning(f"{path} is not drawn: {error}")
    else:
        _save_grid(path, to_uint8(samples), columns=STRIPS[1])


def _save_grid(path: Path, images: Images, columns: int | None = None) -> None:
    save_png(path, image_grid(images, columns))
    log.info(f"picture: {path}")


def table(config, report: dict, path: Path) -> str:
    """The numbers of `report` that `config.eval` asked for, of the checkpoint `path`, as text."""
    evaluate = config.eval
    rows = []
    if evaluate.enable_loss:
        rows.append((f"loss ({evaluate.dataset})", f"{report['loss']:.5g}"))
    if evaluate.enable_bpd:
        value = f"{report['bpd']:.4f} +- {report['bpd_error']:.4f}"
        rows.append((f"bits/dim ({evaluate.dataset})", value))
        rows.append(("  evaluations", f"{report['bpd_nfe']:.0f}"))
        rows.append(("  encoded and decoded, error", f"{report['encoding_error']:.1e}"))
    if evaluate.enable_sampling:
        rows += [
            (label, f"{report[name]:.4g}" if name != "fid" else f"{report[name]:.4f}")
            for name, label in (
                ("fid", f"Frechet distance ({report['features']})"),
                ("IS", "Inception Score"),
                ("kid", "kernel distance"),
                ("precision", "precision"),
                ("recall", "recall"),
                ("nearest", "to the nearest training image"),
                ("nearest_data", "  of a training image to another"),
            )
            if name in report
        ]
        rows.append(("  samples", str(report["num_samples"])))
        if report["nonfinite"]:
            rows.append(("  not finite", str(report["nonfinite"])))
        rows.append(("  evaluations", f"{report['nfe']:.0f}"))
    rows.append(("seconds", f"{report['seconds']:.1f}"))
    return format_table(rows, f"{path.name}, averaged weights of step {report['step']}")


# Below {eval_folder}/, {file}_{k}.png: title and caption on the page.
PICTURES = {
    "ode_images": ("Samples", "The first of those drawn, none chosen."),
    "nearest": (
        "Nearest training images",
        "Samples, and below each the training image nearest to its features. Upper pair of rows: "
        "the samples closest to the data of all; lower pair: the first samples.",
    ),
    "interpolation": (
        "Interpolation",
        "Each row follows the arc between two draws of the prior.",
    ),
    "rescale": (
        "Temperature",
        "Each row keeps the direction of a draw of the prior while its norm grows.",
    ),
}


def save_page(config, run: Experiment, workdir: Path, folder: Path, k: int) -> None:
    """report.html: the numbers of all checkpoints in the folder, the pictures of number k."""
    reports = {}
    for path in folder.glob("report_*.npz"):
        number = path.stem.removeprefix("report_")
        if number.isdigit() and (found := _read_if_whole(path)):
            reports[int(number)] = found
    pictures = [
        Picture(title, caption, _page_png(path))
        for name, (title, caption) in PICTURES.items()
        if (path := folder / f"{name}_{k}.png").exists()
    ]
    scalars = read_scalars(workdir / "tensorboard")
    data, parameters = config.data, sum(p.numel() for p in run.state.parameters)
    name = data_name(config)
    channels = "grey" if data.num_channels == 1 else "colour"
    facts = {
        "method": type(run.method).__name__,
        "network": f"{config.model.name}, {parameters:,} parameters",
        "data": f"{name}, {data.image_size} × {data.image_size}, {channels}",
        "checkpoint": f"step {run.state.step:,}, averaged weights",
        "sampler": f"{config.sampling.method}, {config.sampling.get('ode_solver', '')}",
        "evaluated": time.strftime("%Y-%m-%d"),
    }
    page = render(
        title=f"{workdir.resolve().name}: evaluation",
        facts=facts,
        reports=dict(sorted(reports.items())),
        shown=k,
        curves={name: scalars.get(f"loss/{name}", []) for name in ("train", "test")},
        pictures=pictures,
        config=config.to_dict(),
    )
    with atomic_write(folder / "report.html") as file:
        file.write(page.encode())


def _page_png(path: Path) -> bytes:
    """The picture at `path`, made smaller where it is larger than a page shows."""
    with Image.open(path) as image:
        image.thumbnail((PAGE_PIXELS, PAGE_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _nhwc(images: Tensor) -> Images:
    return images.permute(0, 2, 3, 1).cpu().numpy()


def to_uint8(images: Tensor) -> Images:
    """Images in [0, 1], (B, C, H, W), as uint8 (B, H, W, C)."""
    return _nhwc((images * 255).round().to(torch.uint8))
