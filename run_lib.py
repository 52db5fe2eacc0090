"""Training and evaluation, read from top to bottom; the one place that knows the workdir."""

import contextlib
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

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

log = logging.getLogger(__name__)

SNAPSHOT_SAMPLES = 64  # images drawn with every snapshot
GRID_SAMPLES = 100  # images of an evaluation that its picture shows
STRIPS = (8, 10)  # rows and columns of the pictures of interpolation and rescaling

# Smallest and largest sensible value of what the parts below do not check themselves.
RANGES = {
    "seed": (0, math.inf),
    "training.batch_size": (1, math.inf),
    "training.n_iters": (1, math.inf),
    "training.accumulate": (1, math.inf),
    "training.log_freq": (1, math.inf),
    "training.eval_freq": (1, math.inf),
    "training.snapshot_freq": (1, math.inf),
    "training.snapshot_freq_for_preemption": (1, math.inf),
    "optim.lr": (0, math.inf),
    "optim.warmup": (0, math.inf),
    "optim.cooldown": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "model.nf": (1, math.inf),
    "model.dropout": (0, 1),
    "model.ema_rate": (0, 1),
    "eval.batch_size": (1, math.inf),
    "eval.num_samples": (2, math.inf),
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
def train(config, workdir: Path) -> None:
    """Trains until step `training.n_iters`, from where the workdir's last run stopped."""
    training, seed = config.training, config.seed
    run = Experiment.build(config)
    state, device = run.state, run.device
    state.network = execution.for_training(config, state.model)
    train_data = datasets.get_dataset(config, "train")
    test_data = datasets.get_dataset(config, "test")
    images_per_step = run.method.images_per_step(min(training.batch_size, len(train_data)))
    _check_division(images_per_step, state.accumulate)
    resume_path = workdir / "checkpoints-meta" / "checkpoint.pth"
    if resume_path.exists():
        _restore(state.load_state_dict, resume_path)
    distributed.check_agreement(state.step, state.parameters)
    first, main = state.step + 1, distributed.is_main()

    with _open_workdir(workdir), _summary_writer(workdir, state.step) as board:
        parameters = sum(p.numel() for p in state.parameters)
        log.info(
            f"{'resuming' if state.step else 'starting'} at step {state.step} of "
            f"{training.n_iters}: {len(train_data):,} images, {parameters:,} parameters, {device}"
            + (f", {distributed.world()} processes" if distributed.world() > 1 else "")
        )
        batches = datasets.shuffled_batches(train_data, training.batch_size, seed, state.step)
        with _progress(total=training.n_iters, initial=state.step, unit="step") as progress:
            meter = _Meter(state.step)
            while state.step < training.n_iters:
                generator = datasets.keyed_generator(device, "training", seed, state.step)
                # dropout knows no other generator than the global one
                torch.manual_seed(
                    datasets.keyed_seed("dropout", seed, state.step, distributed.rank())
                )
                images = datasets.to_unit_interval(
                    _copy_ahead(next(batches), device),
                    generator,
                    flip=config.data.random_flip,
                    dequantize=config.data.uniform_dequantization,
                )
                loss = losses.train_step(state, run.loss_fn, run.scaler(images), generator)
                progress.update()

                last = state.step == training.n_iters
                if last or state.step % training.log_freq == 0:
                    loss = distributed.mean(loss).item()
                    speed = meter.rate(state.step) * images_per_step
                    _log_step(progress, board, state.step, loss, speed)
                if state.step == first:  # ranks that go apart do so in their first step
                    distributed.check_agreement(state.step, state.parameters)
                if main and (last or state.step % training.eval_freq == 0):
                    held_out = _held_out_loss(run, test_data[: training.batch_size], seed)
                    board.add_scalar("loss/test", held_out, state.step)
                    log.info(f"step {state.step}: held-out loss {held_out:.5g}")
                snapshot = last or state.step % training.snapshot_freq == 0
                if snapshot:
                    _save(state, _checkpoint_path(workdir, state.step))
                if last or state.step % training.snapshot_freq_for_preemption == 0:
                    _save(state, resume_path)
                if main and snapshot and training.snapshot_sampling:
                    number = min(SNAPSHOT_SAMPLES, images_per_step)
                    folder = workdir / "samples" / f"iter_{state.step}"
                    _draw_snapshot(run, board, folder, number, seed)
        log.info(f"trained to step {state.step}; checkpoints are in {workdir / 'checkpoints'}")


def _log_step(progress, board, step: int, loss: float, images_per_second: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss} at step {step}")
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


def _draw_snapshot(run: Experiment, board, folder: Path, number: int, seed: int) -> None:
    """Samples from the same prior draw at every call, so that pictures can be compared."""
    step = run.state.step
    generator = datasets.keyed_generator(run.device, "snapshot", seed)
    try:
        with run.with_ema():
            samples, nfe = run.sample(run.state.model, number, generator=generator)
    except FloatingPointError as error:  # a network that is still young may have no smooth flow
        log.warning(f"step {step}: no samples drawn: {error}")
        return
    images = _to_uint8(samples)
    grid = evaluation.image_grid(images)
    _save_npz(folder / "sample.npz", samples=images)
    _save_png(folder / "sample.png", grid)
    board.add_image("samples", grid, step, dataformats="HWC")
    log.info(f"step {step}: samples in {nfe} evaluations: {folder / 'sample.png'}")


def _save(state: losses.TrainState, path: Path) -> None:
    """Saves `state` unless it is ruined, which would cost the good checkpoint before it."""
    distributed.check_agreement(state.step, state.parameters)
    if not state.is_finite():
        raise FloatingPointError(f"the weights are not finite at step {state.step}; not saved")
    if distributed.is_main():
        save_checkpoint(path, state.state_dict())


def evaluate(config, workdir: Path, eval_folder: str = "eval") -> None:
    """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` with averaged weights."""
    if not distributed.is_main():
        return  # two writers never write one file
    run = Experiment.build(config)
    if config.eval.features not in evaluation.FEATURES and config.eval.enable_sampling:
        raise ValueError(
            f"unknown features eval.features={config.eval.features!r}; "
            f"known: {', '.join(evaluation.FEATURES)}"
        )
    checkpoints = _checkpoints_to_evaluate(config, workdir)
    train_data = datasets.get_dataset(config, "train")
    split_data = datasets.get_dataset(config, config.eval.dataset)
    folder = workdir / eval_folder
    with _open_workdir(workdir):
        for k, path in checkpoints.items():
            _restore(run.state.load_network, path)
            log.info(f"evaluating {path} on {run.device}")
            for stale in _files_of(folder, k):
                stale.unlink()
            start = time.perf_counter()
            report = {"step": run.state.step}
            with run.with_ema():
                if config.eval.enable_loss:
                    report |= _evaluate_loss(config, run, split_data, folder, k)
                if config.eval.enable_bpd:
                    report |= _evaluate_bpd(config, run, split_data, folder, k)
                if config.eval.enable_sampling:
                    report |= _evaluate_samples(config, run, train_data, folder, k)
                elif config.eval.save_images:
                    _draw_images(config, run, folder, k)
                if config.eval.enable_interpolate:
                    _draw_interpolation(config, run, folder, k)
                if config.eval.enable_rescale:
                    _draw_rescaling(config, run, folder, k)
            report["seconds"] = time.perf_counter() - start
            _save_npz(folder / f"report_{k}.npz", **report)
            log.info(_table(config, report, path))
            log.info(f"report: {folder / f'report_{k}.npz'}")


def _evaluate_loss(config, run: Experiment, data, folder: Path, k: int) -> dict:
    """The loss over a whole split: each image perturbed once in the field of its large batch."""
    generator = datasets.keyed_generator(run.device, "loss", config.seed)
    net, total = run.state.model, 0.0
    with _progress(total=len(data), desc="loss", unit="image") as progress, torch.no_grad():
        for block in _in_order(data, config.training.batch_size):
            charges = run.scaler(datasets.to_unit_interval(block.to(run.device)))
            for batch in charges.split(config.eval.batch_size):
                total += run.loss_fn(net, batch, generator, charges).item() * len(batch)
                progress.update(len(batch))
    loss = total / len(data)
    _save_npz(folder / f"ckpt_{k}_loss.npz", loss=loss)
    return {"loss": loss}


def _evaluate_bpd(config, run: Experiment, data, folder: Path, k: int) -> dict:
    """Bits per dimension of every image of a split, averaged over passes of new noise.

    The latents of the first batch are carried back to images; how far these are from where they
    came shows what the solver's tolerance costs.
    """
    bits_per_dim = likelihood.get_likelihood_fn(config, run.method)
    split = config.eval.dataset
    passes = config.eval.bpd_num_repeats if split == "test" else 1
    net, bpd, evaluations, encoding_error = run.state.model, [], [], None
    with _progress(total=passes * len(data), desc="bits/dim", unit="image") as progress:
        batches = (_in_order(data, config.eval.batch_size) for _ in range(passes))
        for i, images in enumerate(itertools.chain.from_iterable(batches)):
            generator = datasets.keyed_generator(run.device, "bits/dim", config.seed, i)
            images = datasets.to_unit_interval(images.to(run.device), generator, dequantize=True)
            bits, latents, nfe = bits_per_dim(net, run.scaler(images), generator)
            if encoding_error is None:
                encoding_error = _encoding_error(config, run, latents, images)
            bpd.append(bits.double().cpu().numpy())
            evaluations.append(nfe)
            _save_npz(folder / f"{split}_ckpt_{k}_bpd_{i}.npz", bpd=bpd[-1], nfe=nfe)
            progress.update(len(images))
    bpd = np.concatenate(bpd).reshape(passes, len(data)).mean(0)
    return {
        "bpd": bpd.mean(),
        "bpd_error": bpd.std(ddof=1) / math.sqrt(len(bpd)),
        "bpd_nfe": np.mean(evaluations),
        "encoding_error": encoding_error,
    }


@torch.no_grad()
def _encoding_error(config, run: Experiment, latents: Tensor, images: Tensor) -> float:
    """Root mean square of what the way to the latents and back changes, in units of [0, 1]."""
    tolerances = sampling.get_tolerances(config)
    x, _ = sampling.solve_ode(run.method, run.state.model, latents, **tolerances)
    back = datasets.get_data_inverse_scaler(config)(x)
    return (back - images).square().mean().sqrt().item()


def _evaluate_samples(config, run: Experiment, train_data, folder: Path, k: int) -> dict:
    """Draws `eval.num_samples` samples and compares their features with the training split's."""
    wanted, size = config.eval.num_samples, config.eval.batch_size
    every, evaluations = [], []
    with _progress(total=wanted, desc="sampling", unit="image") as progress:
        for r, first in enumerate(range(0, wanted, size)):
            generator = datasets.keyed_generator(run.device, "samples", config.seed, r)
            samples, nfe = run.sample(
                run.state.model, min(size, wanted - first), generator=generator
            )
            every.append(_to_uint8(samples))
            evaluations.append(nfe)
            round_folder = folder / f"ckpt_{k}"
            _save_npz(round_folder / f"samples_{r}.npz", samples=every[-1])
            features = evaluation.pixel_features(every[-1])
            _save_npz(round_folder / f"statistics_{r}.npz", pool_3=features)
            progress.update(len(samples))
    samples = np.concatenate(every)
    _save_grid(folder / f"ode_images_{k}.png", samples[:GRID_SAMPLES])
    fid = evaluation.frechet_distance(
        evaluation.Gaussian.fit(evaluation.pixel_features(samples)),
        evaluation.Gaussian.fit(evaluation.pixel_features(_nhwc(train_data[:]))),
    )
    return {
        "fid": fid,
        "features": config.eval.features,
        "num_samples": len(samples),
        "nfe": np.mean(evaluations),
    }


def _draw_images(config, run: Experiment, folder: Path, k: int) -> None:
    """The first samples of the first round, for the eye only."""
    generator = datasets.keyed_generator(run.device, "samples", config.seed, 0)
    number = min(GRID_SAMPLES, config.eval.batch_size)
    samples, _ = run.sample(run.state.model, number, generator=generator)
    _save_grid(folder / f"ode_images_{k}.png", _to_uint8(samples))


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
    samples, _ = run.sample(run.state.model, x=x, generator=generator)
    _save_grid(path, _to_uint8(samples), columns=STRIPS[1])


def _save_grid(path: Path, images: evaluation.Images, columns: int | None = None) -> None:
    _save_png(path, evaluation.image_grid(images, columns))
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
        rows.append((f"Frechet distance ({report['features']})", f"{report['fid']:.4f}"))
        rows.append(("  samples", str(report["num_samples"])))
        rows.append(("  evaluations", f"{report['nfe']:.0f}"))
    rows.append(("seconds", f"{report['seconds']:.1f}"))
    return evaluation.format_table(rows, f"{path.name}, averaged weights of step {report['step']}")


# --- the workdir ----------------------------------------------------------------------------------


def _checkpoint_path(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / f"checkpoint_{step}.pth"


def _checkpoints_to_evaluate(config, workdir: Path) -> dict[int, Path]:
    """{k: path} of those that exist; FileNotFoundError where none does.

    Number k is that of step k * snapshot_freq. Some published programs name files by k itself; such
    a file is taken where the step it holds agrees.
    """
    first, last, freq = config.eval.begin_ckpt, config.eval.end_ckpt, config.training.snapshot_freq
    if first > last:
        raise ValueError(f"eval.begin_ckpt={first} lies after eval.end_ckpt={last}")
    found, missing = {}, []
    for k in range(first, last + 1):
        path, by_number = _checkpoint_path(workdir, k * freq), _checkpoint_path(workdir, k)
        if path.exists():
            found[k] = path
        elif by_number.exists() and load_checkpoint(by_number)["step"] // freq == k:
            found[k] = by_number
        else:
            missing.append(path)
    folder = workdir / "checkpoints"
    others = sorted(p.name for p in folder.glob("checkpoint_*.pth") if p not in found.values())
    if not found:
        raise FileNotFoundError(
            f"no checkpoint to evaluate: looked in {folder} for checkpoint_{first * freq}.pth to "
            f"checkpoint_{last * freq}.pth (eval.begin_ckpt and eval.end_ckpt count "
            f"training.snapshot_freq={freq} steps); found {', '.join(others) or 'none'}"
        )
    for path in missing:
        log.warning(f"{path} does not exist; passed over")
    if others:
        log.info(f"not asked for in {folder}: {', '.join(others)}")
    return found


def _files_of(folder: Path, k: int) -> list[Path]:
    """What an earlier evaluation of checkpoint k left, which would mix with a new one."""
    patterns = (f"ckpt_{k}/*", f"ckpt_{k}_loss.npz", f"*_ckpt_{k}_bpd_*.npz", f"*_{k}.*")
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _restore(load: Callable[[dict], None], path: Path) -> None:
    loaded = load_checkpoint(path)
    try:
        load(loaded)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit the configured network: {reason:.300}") from error


@contextlib.contextmanager
def _open_workdir(workdir: Path) -> Iterator[None]:
    """Makes the folder, and appends what is logged within the `with` block to its stdout.txt."""
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir {workdir} is a file; name a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    main = distributed.is_main()
    handler = logging.FileHandler(workdir / "stdout.txt") if main else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with logging_redirect_tqdm():
            yield
    except Exception as error:  # the console hears of it from main.py
        handler.handle(
            logging.makeLogRecord({"msg": f"stopped by {type(error).__name__}: {error}"})
        )
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _summary_writer(workdir: Path, step: int):
    """TensorBoard's log; what a killed run logged beyond `step` is purged from it."""
    from tensorboardX import SummaryWriter

    options = {"purge_step": step + 1, "write_to_disk": distributed.is_main()}
    with SummaryWriter(str(workdir / "tensorboard"), **options) as board:
        yield board


def _save_npz(path: Path, **arrays) -> None:
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def _save_png(path: Path, image: evaluation.Images) -> None:
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, format="png")


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


def _check_division(examples: int, accumulate: int) -> None:
    parts = distributed.world() * accumulate
    if examples % parts:
        raise ValueError(
            f"the {examples} images of a step cannot be split evenly into {parts} parts "
            f"({distributed.world()} processes, training.accumulate={accumulate}); change "
            "training.batch_size or training.small_batch_size"
        )


def _copy_ahead(images: Tensor, device: torch.device) -> Tensor:
    """`images` on `device`, where a GPU copies them while the host goes on."""
    if device.type == "cuda" and images.device.type == "cpu":
        images = images.pin_memory()
    return images.to(device, non_blocking=True)


def _in_order(data, size: int) -> Iterator[Tensor]:
    """Every image once, uint8 (B, C, H, W), the last batch being what is left."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


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
