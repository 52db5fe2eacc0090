"""Training and evaluation, read from top to bottom."""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import datasets
import distributed
import evaluation
import execution
import likelihood
import losses
import methods
import models
import sampling
from checkpoints import atomic_write, load_checkpoint, save_checkpoint
from report import Picture, render
from workdir import (
    Board,
    checkpoint_path,
    checkpoints_to_evaluate,
    differences,
    drop_checkpoints,
    fit,
    newest_checkpoint,
    open_workdir,
    save_npz,
    save_png,
    save_to_resume,
    store_config,
)

log = logging.getLogger(__name__)

SNAPSHOT_SAMPLES = 64  # images drawn with every snapshot
GRID_SAMPLES = 100  # images of an evaluation that its picture shows
STRIPS = (8, 10)  # rows and columns of the pictures of interpolation and rescaling
PAIRS = 10  # samples in a row of the picture of nearest training images
DISTANCES_KEPT = 5_000  # training images whose own nearest neighbours are looked for
PAGE_PIXELS = 1400  # side of the largest picture in report.html

# Smallest and largest sensible value of what the parts below do not check themselves.
RANGES = {
    "seed": (0, math.inf),
    "data.image_size": (1, math.inf),
    "data.resident_bytes": (0, math.inf),
    "data.num_workers": (-1, math.inf),
    "training.batch_size": (1, math.inf),
    "training.n_iters": (1, math.inf),
    "training.accumulate": (1, math.inf),
    "training.log_freq": (1, math.inf),
    "training.eval_freq": (1, math.inf),
    "training.snapshot_freq": (1, math.inf),
    "training.snapshot_freq_for_preemption": (1, math.inf),
    "training.keep_checkpoints": (0, math.inf),
    "training.max_bad_steps": (1, math.inf),
    "optim.lr": (0, math.inf),
    "optim.warmup": (0, math.inf),
    "optim.cooldown": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "model.nf": (1, math.inf),
    "model.dropout": (0, 1),
    "model.ema_rate": (0, 1),
    "eval.batch_size": (1, math.inf),
    "eval.num_samples": (evaluation.NEIGHBOURS + 1, math.inf),
}


@dataclass
class Experiment:
    """The parts that a config names, built together, so that a mistake shows before any work."""

    device: torch.device
    method: methods.Method
    state: losses.TrainState
    loss_fn: Callable[..., Tensor]
    sample: Callable[..., tuple[Tensor, int]]
    scaler: Callable[[Tensor], Tensor]

    @classmethod
    def build(cls, config) -> "Experiment":
        """Raises ValueError, in one line, for what the config gets wrong."""
        _check(config)
        device = _device(config.device)
        torch.manual_seed(config.seed)
        execution.set_float32_products(config.training.precision)
        method = methods.get_method(config)
        model = models.create_model(config).to(device)
        return cls(
            device=device,
            method=method,
            state=losses.TrainState(config, model),
            loss_fn=losses.get_loss_fn(config, method),
            sample=sampling.get_sampling_fn(config, method),
            scaler=datasets.get_data_scaler(config),
        )

    def with_ema(self):
        """Within the `with` block the network holds its averaged weights and evaluates."""
        self.state.model.eval()
        return self.state.ema.swapped_into(self.state.parameters)


@distributed.joined()
def train(config, workdir: Path) -> bool:
    """Trains until step `training.n_iters`, from where the workdir's last run stopped.

    Of several processes that torchrun starts, each takes its part of a step's examples, and the
    main one writes.

    Returns:
        Whether it got there; SIGTERM and SIGINT end it before, after a step and with all saved.

    Raises:
        ValueError: the config is wrong, or the workdir's checkpoints do not fit it.
        OSError: a file cannot be written, or another process trains in the workdir.
        FloatingPointError: `training.max_bad_steps` batches in a row gave no finite gradient, or
            the processes do not agree.
    """
    training, seed = config.training, config.seed
    run = Experiment.build(config)
    state, device, main = run.state, run.device, distributed.is_main()
    state.network = execution.for_training(config, state.model)
    train_data = datasets.get_dataset(config, "train").to(device)
    test_data = datasets.get_dataset(config, "test")
    share = _Share.of(run, train_data, training)
    with open_workdir(workdir, workdir / "checkpoints", main):
        written = _resume(config, workdir, state)
        distributed.check_agreement(state.step, state.parameters)
        parameters = sum(p.numel() for p in state.parameters)
        log.info(
            f"{'resuming' if state.step else 'starting'} at step {state.step} of "
            f"{training.n_iters}: {len(train_data):,} images, {parameters:,} parameters, {device}"
            + (f", {distributed.world()} processes" if distributed.world() > 1 else "")
        )
        first = state.step + 1
        batches = datasets.shuffled_batches(
            train_data, training.batch_size, seed, state.step, share.of_images
        )
        meter, watch = _Meter(state.step), _Watch(training.max_bad_steps)

        def due(frequency: int) -> bool:
            return state.step == training.n_iters or state.step % frequency == 0

        with (
            Board(workdir / "tensorboard" if main else None, state.step) as board,
            _progress(total=training.n_iters, initial=state.step, unit="step") as progress,
            _stop_signals() as stop,
        ):
            if main and training.snapshot_sampling and state.step and due(training.snapshot_freq):
                _draw_snapshot(run, board, workdir, seed, share.examples, again=False)
            while state.step < training.n_iters and not distributed.any_of(bool(stop())):
                generator = datasets.keyed_generator(
                    device, "training", seed, state.step, *share.key
                )
                # dropout knows no other generator than the global one
                torch.manual_seed(
                    datasets.keyed_seed("dropout", seed, state.step, distributed.rank())
                )
                images = datasets.to_unit_interval(
                    next(batches).to(device, non_blocking=True),
                    generator,
                    flip=config.data.random_flip,
                    dequantize=config.data.uniform_dequantization,
                )
                images = run.scaler(images)
                loss = losses.train_step(
                    state, run.loss_fn, images[: share.taken], generator, images, share.of_examples
                )
                watch.add(state.step - 1, loss)
                progress.update()

                if due(training.log_freq):
                    speed = meter.rate(state.step) * share.examples
                    _log_step(progress, board, state.step, watch.look(), speed)
                if state.step == first:  # processes that go apart do so in their first step
                    distributed.check_agreement(state.step, state.parameters)
                if main and due(training.eval_freq):
                    held_out = _held_out_loss(run, test_data[: training.batch_size], seed)
                    board.add_scalar("loss/test", held_out, state.step)
                    log.info(f"step {state.step}: held-out loss {held_out:.5g}")
                if due(training.snapshot_freq):
                    written.append(state.step)
                    content = _content(state, written)
                    if main:
                        save_checkpoint(checkpoint_path(workdir, state.step), content)
                        written = drop_checkpoints(workdir, written, training.keep_checkpoints)
                if due(training.snapshot_freq_for_preemption):
                    board.flush()
                    content = _content(state, written)
                    if main:
                        save_to_resume(workdir, content)
                drawing = training.snapshot_sampling and due(training.snapshot_freq)
                if main and drawing and not stop():
                    _draw_snapshot(run, board, workdir, seed, share.examples)

            if state.step < training.n_iters:
                content = _content(state, written)
                if main:
                    save_to_resume(workdir, content)
                watch.look()
                log.info(f"stopped by {stop() or 'a signal'} at step {state.step}, which is saved")
                return False
        log.info(f"trained to step {state.step}; checkpoints are in {workdir / 'checkpoints'}")
        return True


@dataclass(frozen=True)
class _Share:
    """What this process takes of each step, whose `examples` images the network sees.

    Of images in memory all processes are given the whole batch, whose draws they repeat, and take
    their part of the examples: they train exactly as one process would. Of images on disk each
    decodes its own part of the batch, which makes its charges, and has its own draws.

    Attributes:
        examples: of all processes together.
        taken: from the head of what this process is given, so many are examples.
        of_images, of_examples: (k, n): this process is given, and then takes, the k-th of n slices.
        key: of its draws, added to (seed, step).
    """

    examples: int
    taken: int
    of_images: tuple[int, int]
    of_examples: tuple[int, int]
    key: tuple[int, ...]

    @classmethod
    def of(cls, run: Experiment, data, training) -> "_Share":
        """Raises ValueError where the examples cannot be shared equally."""
        rank, world = distributed.rank(), distributed.world()
        examples = run.method.images_per_step(min(training.batch_size, len(data)))
        parts = world * training.accumulate
        if examples % parts:
            raise ValueError(
                f"the {examples} images of a step cannot be split evenly into {parts} parts "
                f"({world} processes, training.accumulate={training.accumulate}); change "
                "training.batch_size or training.small_batch_size"
            )
        if isinstance(data, datasets.Stream) and world > 1:
            return cls(examples, examples // world, (rank, world), (0, 1), (rank,))
        return cls(examples, examples, (0, 1), (rank, world), ())


def _resume(config, workdir: Path, state: losses.TrainState) -> list[int]:
    """Loads the newest intact state into `state`, if there is one.

    Returns the steps of the numbered checkpoints that the run has written so far.
    """
    found = newest_checkpoint(workdir)
    if found is None:
        if distributed.is_main():
            store_config(workdir, config)
        return []
    path, content = found
    changes = differences(workdir, config)
    fit(state.load_state_dict, content, path, changes)
    for change in changes:
        log.warning(f"the config differs from that of the run's first start: {change}")
    return [int(step) for step in content.get("written", [])]


def _content(state: losses.TrainState, written: list[int]) -> dict:
    """What a checkpoint holds; never ruined weights, which would cost the good ones before."""
    distributed.check_agreement(state.step, state.parameters)
    if not state.is_finite():
        raise FloatingPointError(f"the weights are not finite at step {state.step}; not saved")
    return state.state_dict() | {"written": written}


def _log_step(progress, board: Board, step: int, loss: float, images_per_second: float) -> None:
    progress.set_postfix_str(f"loss {loss:.4g}, {images_per_second:.0f} images/s")
    board.add_scalar("loss/train", loss, step)
    board.add_scalar("images_per_second", images_per_second, step)


def _held_out_loss(run: Experiment, images: Tensor, seed: int) -> float:
    """Loss of the averaged network on `images`, with the same noise at every call."""
    batch = run.scaler(datasets.to_unit_interval(images.to(run.device)))
    with run.with_ema(), torch.no_grad():
        return run.loss_fn(
            run.state.model, batch, datasets.keyed_generator(run.device, "held out", seed)
        ).item()


def _draw_snapshot(
    run: Experiment, board: Board, workdir: Path, seed: int, number: int, again: bool = True
) -> None:
    """Samples from the same prior draw at every call, so that pictures can be compared.

    Args:
        number: how many, though at most SNAPSHOT_SAMPLES.
        again: also where the picture is there; where a run resumes, it is missing if the run was
            stopped between saving and drawing.
    """
    step = run.state.step
    folder = workdir / "samples" / f"iter_{step}"
    if not again and (folder / "sample.png").exists():
        return
    generator = datasets.keyed_generator(run.device, "snapshot", seed)
    number = min(SNAPSHOT_SAMPLES, number)
    try:
        with run.with_ema():
            samples, nfe = run.sample(run.state.model, number, generator=generator)
    except FloatingPointError as error:  # a network that is still young may have no smooth flow
        log.warning(f"step {step}: no samples drawn: {error}")
        return
    images = _to_uint8(samples)
    grid = evaluation.image_grid(images)
    save_npz(folder / "sample.npz", samples=images)
    save_png(folder / "sample.png", grid)
    board.add_image("samples", grid, step)
    log.info(f"step {step}: samples in {nfe} evaluations: {folder / 'sample.png'}")


def evaluate(config, workdir: Path, eval_folder: str = "eval") -> None:
    """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` with averaged weights.

    What an earlier evaluation left half done is gone on with: a part on disk counts where it came
    from the same weights with the same settings.
    """
    if not distributed.is_main():
        return  # two writers never write one file
    run = Experiment.build(config)
    checkpoints = checkpoints_to_evaluate(config, workdir)
    folder = workdir / eval_folder
    if config.eval.enable_loss or config.eval.enable_bpd:
        data = datasets.get_dataset(config, config.eval.dataset)
    if config.eval.enable_sampling:
        judge = evaluation.Judge.build(config, run.device)
    with open_workdir(workdir, folder):
        if config.eval.enable_sampling and judge.reference is None:
            with _progress(total=len(judge.data), desc="data", unit="image") as progress:
                judge.measure(progress.update)
        for k, path in checkpoints.items():
            fit(run.state.load_network, load_checkpoint(path), path)
            log.info(f"evaluating {path} on {run.device}")
            for stale in (folder / f"report_{k}.npz", *folder.glob(f"*_{k}.png")):
                stale.unlink(missing_ok=True)
            start = time.perf_counter()
            report = {"step": run.state.step}
            with run.with_ema():
                origin = _origin(config, run)
                if config.eval.enable_loss:
                    report |= _evaluate_loss(config, run, data, folder, k, origin)
                if config.eval.enable_bpd:
                    report |= _evaluate_bpd(config, run, data, folder, k, origin)
                if config.eval.enable_sampling:
                    report |= _evaluate_samples(config, run, judge, folder, k, origin)
                elif config.eval.save_images:
                    _draw_images(config, run, folder, k)
                if config.eval.enable_interpolate:
                    _draw_interpolation(config, run, folder, k)
                if config.eval.enable_rescale:
                    _draw_rescaling(config, run, folder, k)
            report["seconds"] = time.perf_counter() - start
            save_npz(folder / f"report_{k}.npz", **report)
            _save_page(config, run, workdir, folder, k)
            log.info(_table(config, report, path))
            log.info(f"report: {folder / f'report_{k}.npz'}, {folder / 'report.html'}")


def _origin(config, run: Experiment) -> dict:
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


def _read_if_whole(path: Path) -> dict:
    """The arrays at `path`; none where it does not exist, or is damaged, of which the log tells."""
    try:
        return evaluation.read_arrays(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning(f"{error}; it is not used")
        return {}


def _remove_others(found: Iterable[Path], wanted: list[Path]) -> None:
    """Removes what an earlier evaluation with other numbers left, which would mix with this one."""
    for path in set(found) - set(wanted):
        path.unlink(missing_ok=True)


def _evaluate_loss(config, run: Experiment, data, folder: Path, k: int, origin: dict) -> dict:
    """The loss over a whole split: each image perturbed once in the field of its large batch."""

    def compute() -> dict:
        generator = datasets.keyed_generator(run.device, "loss", config.seed)
        net, total = run.state.model, 0.0
        with _progress(total=len(data), desc="loss", unit="image") as progress, torch.no_grad():
            for block in datasets.in_order(data, config.training.batch_size):
                charges = run.scaler(datasets.to_unit_interval(block.to(run.device)))
                for batch in charges.split(config.eval.batch_size):
                    total += run.loss_fn(net, batch, generator, charges).item() * len(batch)
                    progress.update(len(batch))
        return {"loss": total / len(data)}

    sizes = {"batch": config.training.batch_size, "at once": config.eval.batch_size}
    training = config.training.to_dict()
    origin = origin | {"data": evaluation.fingerprint(data), "sizes": sizes, "training": training}
    return {"loss": _once(folder / f"ckpt_{k}_loss.npz", origin, compute)["loss"]}


def _evaluate_bpd(config, run: Experiment, data, folder: Path, k: int, origin: dict) -> dict:
    """Bits per dimension of every image of a split, averaged over passes of new noise.

    The latents of the first batch are carried back to images; how far these are from where they
    came shows what the solver's tolerance costs.
    """
    bits_per_dim = likelihood.get_likelihood_fn(config, run.method)
    split, size = config.eval.dataset, config.eval.batch_size
    passes = config.eval.bpd_num_repeats if split == "test" else 1
    origin = origin | {"data": evaluation.fingerprint(data), "divergence": config.eval.divergence}

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
    parts = []
    with _progress(total=passes * len(data), desc="bits/dim", unit="image") as progress:
        for i, start in enumerate(starts):
            parts.append(_once(paths[i], origin | {"batch": (i, size)}, partial(compute, i, start)))
            progress.update(len(parts[-1]["bpd"]))
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


def _evaluate_samples(
    config, run: Experiment, judge: evaluation.Judge, folder: Path, k: int, origin: dict
) -> dict:
    """Draws `eval.num_samples` samples and compares their features with those of the data."""
    wanted = config.eval.num_samples
    rounds = _draw_rounds(config, run, judge.space, folder / f"ckpt_{k}", origin)
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
    if len(features) <= evaluation.NEIGHBOURS:
        log.warning(f"{len(features)} finite samples are too few to be compared with the data")
        return found
    log.info(f"comparing {len(features):,} samples with the data")
    logits = np.concatenate(logits) if logits else None
    device = run.device if run.device.type == "cuda" else torch.device("cpu")  # for float64
    found |= evaluation.compare(features, logits, judge.reference, judge.space.metrics, device)
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
    rounds = []
    with _progress(total=wanted, desc="sampling", unit="image") as progress:
        for r, number in enumerate(numbers):
            key = origin | {"round": r, "number": number}
            samples = _once(drawn[r], key, partial(_draw_round, config, run, r, number))
            key |= {"features": space.name}
            features = _once(measured[r], key, partial(_features, space, samples["samples"]))
            cost = {"nfe": samples["nfe"], "seconds": samples["seconds"]}
            rounds.append(features | cost | {"path": drawn[r]})
            progress.update(number)
    return rounds


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
    return {"samples": _to_uint8(samples[finite]), "nfe": nfe}


def _features(space: evaluation.FeatureSpace, images: evaluation.Images) -> dict:
    if not len(images):
        return {"pool_3": np.empty((0, space.width), np.float32)}
    pool_3, logits = space(images)
    return {"pool_3": pool_3} if logits is None else {"pool_3": pool_3, "logits": logits}


def _samples_at(rounds: list[dict], rows: np.ndarray) -> evaluation.Images:
    """The samples number `rows`, from the files of the rounds, each of which is read once."""
    ends = np.cumsum([len(part["pool_3"]) for part in rounds])
    round_of = np.searchsorted(ends, rows, side="right")
    images = {}
    for r in np.unique(round_of):
        samples = evaluation.read_arrays(rounds[r]["path"])["samples"]
        images |= {row: samples[row - ends[r]] for row in rows[round_of == r]}
    return np.stack([images[row] for row in rows])


def _draw_nearest(
    judge: evaluation.Judge, rounds: list[dict], features: np.ndarray, path: Path, device
) -> dict:
    """Looks for copies: how far samples are from the training images nearest to them.

    The picture has samples with their nearest training images below: first those samples that are
    closest to the data, then the first ones drawn. For comparison, training images are measured
    against all the other ones.
    """
    reference, number = judge.reference, min(PAIRS, len(features))
    distances, found = evaluation.nearest(features, reference.features, 1, device)
    some = reference.features[:DISTANCES_KEPT]
    among_data = evaluation.nearest(some, reference.features, 2, device)[0][:, 1]
    strips = []
    for shown in (distances[:, 0].argsort()[:number], np.arange(number)):
        index = torch.from_numpy(reference.index[found[shown, 0]])
        pairs = np.concatenate([_samples_at(rounds, shown), _nhwc(judge.data[index])])
        strips.append(evaluation.image_grid(pairs, columns=number))
    save_png(path, np.concatenate(strips))
    return {"nearest": np.median(distances), "nearest_data": np.median(among_data)}


def _draw_images(config, run: Experiment, folder: Path, k: int) -> None:
    """The first samples of the first round, for the eye only."""
    number = min(GRID_SAMPLES, config.eval.batch_size)
    samples = _draw_round(config, run, 0, number)["samples"]
    if len(samples):
        _save_grid(folder / f"ode_images_{k}.png", samples)


def _draw_interpolation(config, run: Experiment, folder: Path, k: int) -> None:
    """Each row goes from one prior sample to another along the arc between them."""
    shape = (config.data.num_channels, config.data.image_size, config.data.image_size)
    generator = datasets.keyed_generator(run.device, "interpolation", config.seed)
    ends = run.method.prior_sampling((2 * STRIPS[0], *shape), generator, run.device)
    shares = torch.linspace(0, 1, STRIPS[1], device=run.device)
    x = sampling.spherical_interpolation(*ends.chunk(2), shares).flatten(0, 1)
    _draw_strips(run, x, folder / f"interpolation_{k}.png", generator)


def _draw_rescaling(config, run: Experiment, folder: Path, k: int) -> None:
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
        _save_grid(path, _to_uint8(samples), columns=STRIPS[1])


def _save_grid(path: Path, images: evaluation.Images, columns: int | None = None) -> None:
    save_png(path, evaluation.image_grid(images, columns))
    log.info(f"picture: {path}")


def _table(config, report: dict, path: Path) -> str:
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
    return evaluation.format_table(rows, f"{path.name}, averaged weights of step {report['step']}")


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


def _save_page(config, run: Experiment, workdir: Path, folder: Path, k: int) -> None:
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
    scalars = _scalars(workdir / "tensorboard")
    data, parameters = config.data, sum(p.numel() for p in run.state.parameters)
    name = evaluation.data_name(config)
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


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of TensorBoard's files, as far as they are whole."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(folder.glob("events.out.tfevents.*")):  # names begin with the time
        try:
            for event in map(Event.FromString, _records(path)):
                if event.session_log.status == SessionLog.START:  # a run resumed before this step
                    for tag, points in curves.items():
                        curves[tag] = {s: v for s, v in points.items() if s < event.step}
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        curves[value.tag][event.step] = value.simple_value
        except DecodeError:
            log.warning(f"{path} is damaged; the loss curve lacks what follows in it")
    return {tag: sorted(points.items()) for tag, points in curves.items()}


def _records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, data, their checksum."""
    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12:
            length = int.from_bytes(head[:8], "little")
            record = file.read(length) if length <= path.stat().st_size else b""
            if len(file.read(4)) < 4:  # cut short by a kill
                return
            yield record


# --- small things ---------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=distributed.local_device(torch.device(name))).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used: {reason}") from error


def _check(config) -> None:
    """Raises ValueError for numbers that would show only in the middle of a run, or never."""
    for key, (low, high) in RANGES.items():
        section, _, name = key.rpartition(".")
        value = (config[section] if section else config)[name]
        if not low <= value <= high:
            bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ValueError(f"{key} must be {bound}, not {value}")
    if config.eval.dataset not in datasets.SPLITS:
        raise ValueError(
            f"unknown split eval.dataset={config.eval.dataset!r}; "
            f"known: {', '.join(datasets.SPLITS)}"
        )
    norms = config.eval.rescale_norms
    if norms and not (len(norms) == 2 and 0 < norms[0] < norms[1]):
        raise ValueError(f"eval.rescale_norms must be two rising norms or (), not {norms}")


def _nhwc(images: Tensor) -> evaluation.Images:
    return images.permute(0, 2, 3, 1).cpu().numpy()


def _to_uint8(images: Tensor) -> evaluation.Images:
    """Images in [0, 1], (B, C, H, W), as uint8 (B, H, W, C)."""
    return _nhwc((images * 255).round().to(torch.uint8))


def _progress(**options) -> tqdm:
    """A progress bar that redraws often on a terminal and seldom in a file."""
    interactive = sys.stderr.isatty()
    options |= {"disable": not distributed.is_main()}
    return tqdm(mininterval=0.2 if interactive else 10, dynamic_ncols=interactive, **options)


class _Meter:
    """Steps per second since it was last asked."""

    def __init__(self, step: int):
        self.step, self.time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self.step) / (now - self.time)
        self.step, self.time = step, now
        return rate


class _Watch:
    """Looks at the losses of several steps at once, so that no step waits for its device."""

    def __init__(self, max_bad_steps: int):
        self.limit, self.bad_in_a_row, self.newest = max_bad_steps, 0, math.nan
        self.batches, self.losses = [], []

    def add(self, batch: int, loss: Tensor) -> None:
        """Notes the loss of a step on batch number `batch`; not finite: it was not applied."""
        self.batches.append(batch)
        self.losses.append(loss)
        if len(self.losses) >= self.limit:
            self.look()

    def look(self) -> float:
        """The newest loss; FloatingPointError after `max_bad_steps` in a row that are not finite.

        Each of those is named in a warning.
        """
        losses = distributed.mean(torch.stack(self.losses)).tolist() if self.losses else []
        for batch, loss in zip(self.batches, losses, strict=True):
            self.newest = loss
            self.bad_in_a_row = 0 if math.isfinite(loss) else self.bad_in_a_row + 1
            if self.bad_in_a_row:
                log.warning(
                    f"batch {batch}: the loss or its gradient is not finite; the step is not "
                    f"applied ({self.bad_in_a_row} in a row)"
                )
            if self.bad_in_a_row == self.limit:
                raise FloatingPointError(
                    f"the loss or its gradient was not finite for training.max_bad_steps="
                    f"{self.limit} batches in a row, the last one number {batch}; the weights "
                    "before them are not ruined, and the last checkpoint is intact"
                )
        self.batches, self.losses = [], []
        return self.newest


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], str | None]]:
    """Within the block SIGTERM and SIGINT only ask to stop; a second one ends the process at once.

    Yields a function that gives the name of the signal received, or None. Where another thread
    than the main one runs this, which cannot handle signals, they do what they did.
    """
    process, received = os.getpid(), []

    def receive(number: int, frame) -> None:
        if os.getpid() != process:  # a forked worker, which inherits this
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return  # the terminal interrupts all; it is for the parent to stop
        received.append(signal.Signals(number).name)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(each) is not signal.SIG_IGN:
                handlers[each] = signal.signal(each, receive)
    try:
        yield lambda: received[0] if received else None
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
