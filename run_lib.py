"""Training, evaluation, sampling and export, read from top to bottom."""

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

import datasets
import distributed
import evaluation
import execution
import sampling
from configs.keys import flatten
from experiment import Experiment, complete, decide_precisions, identity_of, load
from library.ema import rebuild_ema
from library.restoration import ToRestore
from library.trained import Trained
from metrics.reference import ReferenceStatistics, origin_of
from models.weights import load_ema
from reports import settings
from reports.drawings import draw_classes, draw_interpolation, draw_rescaling
from reports.evaluation_page import save_page
from reports.films import check_writer, save_film
from reports.images import image_grid, to_uint8
from reports.progress import progress_bar, solver_bar
from reports.samples import SampleFiles
from reports.table import report_table
from sources.base import Picture
from sources.folder import read_images
from sources.preparation import Preparation
from storage import run_config
from storage.checkpoints import fit, open_checkpoint, save_checkpoint
from storage.digests import digests
from storage.files import cached, save_npz, save_png
from storage.run_checkpoints import (
    checkpoints_to_evaluate,
    drop_checkpoints,
    newest_checkpoint,
    save_to_resume,
    written_steps,
)
from storage.shared_files import SHARED, save_shared
from storage.tensorboard import TensorBoardWriter
from storage.workdir import (
    check_settings,
    checkpoint_path,
    evaluation_folder,
    open_workdir,
    save_settings,
)
from training import TrainState, held_out_loss, train_step

log = logging.getLogger(__name__)

SNAPSHOT_SAMPLES = 64  # images drawn with every snapshot
FILM_SAMPLES = 36  # samples that a film shows
FILM_PIXELS = 192  # least side of a film of one image
FRAMES = 48  # of a film between two images


@distributed.joined()
def train(config, workdir: Path, dry_run: bool = False) -> bool:
    """Trains until step `training.n_iters`, from where the workdir's last run stopped.

    Of several processes that torchrun starts, each takes its shard of a step's examples, and the
    main one writes. A `dry_run` says what would be done, and writes nothing.

    Returns:
        Whether it got there; SIGTERM and SIGINT end it before, after a step and with all saved.

    Raises:
        ValueError: the config is wrong, or the workdir's checkpoints do not fit it.
        OSError: a file cannot be written, or another process trains in the workdir.
        FloatingPointError: `training.max_bad_steps` batches in a row gave no finite gradient, or
            the processes do not agree.
    """
    config, decided = complete(config, workdir)
    config, precisions = decide_precisions(config, workdir)
    training, seed = config.training, config.seed
    run, main = Experiment.build(config, identity_of(workdir)), distributed.is_main()
    device, parameters = run.device, sum(p.numel() for p in run.network.parameters())
    execution.check_precision(training.precision, device)
    run.sampler = sampling.for_snapshots(run.sampler, training.snapshot_solver)
    execution.prepare_process(training.precision, device)
    prepare = Preparation.from_config(config, run.codec, shared=run.method.uses_reference_batch)
    data = run.data.identity_of_run().entry() if main and not dry_run else {}
    train_data, test_data = run.data.get("train").to(device), run.data.get("test")
    names = getattr(train_data, "names", ())
    distributed.check_same("data", f"{len(train_data)} and {len(test_data)} images {names}")
    images_per_step = min(run.objective.examples, len(train_data))
    draws = main and training.snapshot_sampling
    on_disk = isinstance(train_data, datasets.Stream)  # each process decodes its shard of a batch
    _check_division(images_per_step, training.accumulate)
    if on_disk:
        _check_division(min(run.objective.batch_size, len(train_data)))
    shard = distributed.rank(), distributed.world()
    plan = [
        f"{run.method.name}, {len(train_data):,} images, "
        f"{parameters:,} parameters, {device}"
        + (f", {distributed.world()} processes" if distributed.world() > 1 else ""),
        run.data.describe(train_data, test_data, prepare.words),
        *getattr(run.network, "remarks", ()),
        *[decided] * bool(decided),
        *precisions,
    ]
    if dry_run:
        read = partial(open_checkpoint, intact=True)  # of all that it has, the weights are loaded
        step, newest = 0, newest_checkpoint(workdir, set_aside=False, read=read)
        if newest:
            path, content = newest
            changes = run_config.changes(path, content, config)
            step = fit(partial(load_ema, run.network), content, path, changes)
        log.info(f"would train from step {step} to {training.n_iters} in {workdir}: {plan[0]}")
        for line in plan[1:]:
            log.info(line)
        run.data.close()
        return True
    config.data.changed = "refuse"  # the permission is for this start, and not stored
    state = TrainState.from_config(config, run.network, run.objective)
    state.network = execution.for_training(
        run.network,
        training.precision,
        training.channels_last,
        training.compile,
        some_unused=not config.model.conditional,  # published networks have unused layers then
    )
    with open_workdir(workdir, workdir / "checkpoints", main):
        written = _resume(config, workdir, state)
        state.check_agreement()
        log.info(
            f"{'resuming' if state.step else 'starting'} at step {state.step} of "
            f"{training.n_iters}: {plan[0]}"
        )
        for line in plan[1:]:
            log.info(line)
        run.data.close()
        if main and state.step and run.data.stored is None:
            log.info(
                "the run does not say what its data were; from here on they are these, digest "
                f"{data['digest']}"
            )
        first = state.step + 1
        batches = datasets.shuffled_batches(
            train_data, run.objective.batch_size, seed, state.step, shard if on_disk else (0, 1)
        )
        watch = _Watch(training.max_bad_steps, config.optim.nonfinite)
        logged, logged_at = state.step, time.perf_counter()

        def due(frequency: int) -> bool:
            return state.step == training.n_iters or state.step % frequency == 0

        with (
            TensorBoardWriter(workdir / "tensorboard" if main else None, state.step) as writer,
            progress_bar(total=training.n_iters, initial=state.step, unit="step") as progress,
            _stop_signals() as stop,
        ):
            # a run that was stopped between saving and drawing lacks its last picture
            picture = workdir / f"samples/iter_{state.step}/sample.png"
            if draws and state.step and due(training.snapshot_freq) and not picture.exists():
                _draw_snapshot(run, state, writer, workdir, seed, images_per_step, stop)
            while state.step < training.n_iters and not distributed.any_of(bool(stop())):
                generator = datasets.keyed_generator(device, "training", seed, state.step)
                # dropout knows no other generator than the global one
                torch.manual_seed(datasets.keyed_seed("dropout", seed, state.step, shard[0]))
                batch = next(batches).to(device, non_blocking=True)
                if on_disk:
                    batch = batch.map(distributed.gather)
                batch = prepare(batch, generator)
                loss = train_step(state, batch, generator, shard)
                watch.add(state.step - 1, loss)
                progress.update()

                if due(training.log_freq):
                    now = time.perf_counter()
                    speed = (state.step - logged) * images_per_step / (now - logged_at)
                    logged, logged_at, newest = state.step, now, watch.look()
                    progress.set_postfix_str(f"loss {newest:.4g}, {speed:.0f} images/s")
                    writer.add_scalar("loss/train", newest, state.step)
                    writer.add_scalar("images_per_second", speed, state.step)
                if state.step == first:  # processes that go apart do so in their first step
                    state.check_agreement()
                if due(training.eval_freq):
                    held_out = _held_out_loss(run, state, test_data, seed)
                    writer.add_scalar("loss/test", held_out, state.step)
                    log.info(f"step {state.step}: held-out loss {held_out:.5g}")
                numbered = due(training.snapshot_freq)
                if numbered or due(training.snapshot_freq_for_preemption):
                    writer.flush()
                    written = _save(config, data, workdir, state, written, numbered)
                if draws and numbered and not stop():
                    _draw_snapshot(run, state, writer, workdir, seed, images_per_step, stop)

            if state.step < training.n_iters:
                _save(config, data, workdir, state, written)
                watch.look()
                log.info(f"stopped by {stop() or 'a signal'} at step {state.step}, which is saved")
                return False
        log.info(f"trained to step {state.step}; checkpoints are in {workdir / 'checkpoints'}")
        return True


@distributed.joined()
def evaluate(config, workdir: Path, eval_folder: str = "eval", dry_run: bool = False) -> None:
    """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` with EMA weights.

    A `dry_run` says what would be done, and writes nothing.

    What an earlier evaluation left half done is gone on with: a file on disk counts where it came
    from the same weights with the same settings. Several processes share the batches of bits/dim
    and the rounds of samples; the rest is the main one's.

    Raises:
        ValueError: the config is wrong, or a checkpoint is damaged or does not fit it.
        OSError: there is no checkpoint, a file cannot be written, or another process writes to
            the folder.
        FloatingPointError: the ODE of a likelihood cannot be solved, or that of samples not within
            `sampling.max_evaluations`.
    """
    config, decided = complete(config, workdir)
    # the training's is that of the run; how fast sampling is belongs to this machine
    config, precisions = decide_precisions(config, workdir, kept=("training.precision",))
    run = Experiment.build(config, identity_of(workdir, config))
    eval_config, main, sampler = config.eval, distributed.is_main(), run.sampler
    execution.prepare_process(config.training.precision, run.device)
    if not any(eval_config[what] for what in evaluation.PARTS) and not config.sampling.restore:
        raise ValueError(
            f"nothing is asked for: set one of {', '.join(f'eval.{w}' for w in evaluation.PARTS)}, "
            "sampling.restore"
        )
    if eval_config.enable_classification and not config.data.num_classes:
        raise ValueError("eval.enable_classification needs class labels: data.num_classes is 0")
    folder = evaluation_folder(workdir, eval_folder)
    checkpoints = checkpoints_to_evaluate(
        workdir,
        eval_config.begin_ckpt,
        eval_config.end_ckpt,
        config.training.snapshot_freq,
        config.training.n_iters,
    )
    data, statistics, restored = None, [], None
    if eval_config.enable_loss or eval_config.enable_bpd or eval_config.enable_classification:
        data = run.data.get(eval_config.dataset)
    if eval_config.enable_bpd or eval_config.enable_classification:
        run.check_likelihood()
    if any(map(eval_config.get, evaluation.DRAWN)):
        run.draw_conditions(1, "check")  # raises where there is no label to sample with
    if eval_config.enable_sampling:
        statistics = ReferenceStatistics.from_config(config, run.device, run.data)
    if config.sampling.restore:
        restored = ToRestore.from_config(config, run)
    if dry_run:
        parts = [what for what in evaluation.PARTS if eval_config[what]]
        parts += [f"restore {config.sampling.restore}"] if config.sampling.restore else []
        for path in checkpoints.values():
            log.info(f"would evaluate {path} on {run.device}: {', '.join(parts)}")
        log.info(f"the results would be in {folder}")
        run.data.close()
        return
    with open_workdir(workdir, folder, main):
        distributed.barrier()  # nobody writes before the main process holds the lock
        for line in [decided] * bool(decided) + precisions:
            log.info(line)
        run.data.close()
        origin_of_data = {} if data is None else origin_of(data)
        for each in statistics if main else ():
            if each.reference is None:
                with progress_bar(total=len(each.data), desc="data", unit="image") as progress:
                    each.measure(progress.update)
        said = []
        for k, path in checkpoints.items():
            content = open_checkpoint(path, intact=True)
            changes = run_config.changes(path, content, config)
            step = fit(partial(load_ema, run.network), content, path, changes)
            if eval_config.enable_loss:  # an objective may have learned weights too
                fit(run.load_objective, content, path, changes)
            run.network.eval()
            run.objective.eval()
            for change in [] if said == changes else changes:
                log.info(f"the config differs from that of the run: {change}")
            said = changes
            if eval_config.ema_std:
                rebuilt = rebuild_ema(run.network, eval_config.ema_std, workdir, path, content)
                log.info(f"{path.name}: {rebuilt}")
            log.info(f"evaluating {path} on {run.device}")
            if main:
                evaluation.remove_results(folder, k)
            start = time.perf_counter()
            report = {"step": step}
            report |= {"ema_std": eval_config.ema_std} if eval_config.ema_std else {}
            origin = run.origin()
            made_by = settings.from_config(
                config, run, step, origin, data, statistics, restored, origin_of_data
            )
            report["settings"] = settings.to_json(made_by)
            run.sampler = sampler
            if any(map(eval_config.get, evaluation.DRAWN)):
                run.sampler = run.fitted_sampler(path)
            parts = evaluation.Evaluation.from_config(
                config, run, folder, k, origin, origin_of_data, step
            )
            if eval_config.enable_bpd:
                report |= parts.bits_per_dim(data)
            if eval_config.enable_classification:
                report |= parts.classification(data)
            if eval_config.enable_sampling:
                report |= parts.samples(statistics)
            if restored:
                report |= parts.restoration(restored)
            if not main:
                continue
            if eval_config.enable_loss:
                report |= parts.loss(data, config.training.batch_size)
            if eval_config.save_images and not eval_config.enable_sampling:
                parts.draw_images()
            if eval_config.enable_sampling or eval_config.save_images:
                draw_classes(run, config.seed, parts.picture("classes"))
            if eval_config.enable_interpolate:
                draw_interpolation(run, config.seed, parts.picture("interpolation"))
            if eval_config.enable_rescale:
                draw_rescaling(
                    run, config.seed, parts.picture("rescale"), eval_config.rescale_norms
                )
            run.data.close()
            report["seconds"] = time.perf_counter() - start
            save_npz(folder / f"report_{k}.npz", **report)
            save_page(config.to_dict(), run, workdir, folder, k, step)
            width = f" of width {eval_config.ema_std:g}" if eval_config.ema_std else ""
            title = f"{path.name}, EMA weights{width} of step {report['step']}"
            log.info(report_table(report, eval_config.dataset, title))
            log.info(f"report: {folder / f'report_{k}.npz'}, {folder / 'report.html'}")


@distributed.joined()
def sample(
    config,
    workdir: Path,
    outdir: Path | None = None,
    checkpoint: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Draw the samples of `sampling.seeds`, and the results of `film`, `encode` and `between`.

    They are written to `outdir`, by default a folder of the workdir, with the EMA weights of
    `checkpoint`, by default the newest. Files that are there are kept; a folder has those of one
    network and one sampler. With `sampling.restore`, seed s restores image number s modulo their
    number. Several processes share the seeds; the rest is the main one's. A `dry_run` says what
    would be done, and writes nothing.

    Raises:
        ValueError: the config is wrong, an image cannot be read or has the wrong size, or the
            folder has samples of other settings.
        OSError: there is no checkpoint, or a file cannot be written.
        FloatingPointError: the solver diverges.
    """
    config, decided = complete(config, workdir)
    config, precisions = decide_precisions(config, workdir, kept=("training.precision",))
    options, main = config.sampling, distributed.is_main()
    if options.film or options.between:
        check_writer(options.film_format)
    seeds = sampling.seeds_of(
        options.seeds or ("" if options.encode or options.between else "0-63")
    )
    pictures = _read_pictures(config, "sampling.encode", [options.encode] if options.encode else [])
    pair = options.between.split(",") if options.between else []
    ends = _read_pictures(config, "sampling.between", pair)
    if ends and len(ends) != 2:
        raise ValueError(f"sampling.between={options.between} must be two images, A.png,B.png")
    run = load(checkpoint or workdir, config=config, fits=not dry_run)  # a fit takes time
    execution.prepare_process(config.training.precision, run.experiment.device)
    if pictures or ends:
        run.conditions_of(None, 1)  # raises where the network needs more conditions of images
    restored = ToRestore.from_config(config, run.experiment) if options.restore else None
    folder = outdir.absolute() if outdir else workdir / "samples" / f"step_{run.step}"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--outdir={folder} is a file; name a folder")
    settings = _settings(config, run, restored)
    stored = check_settings(folder, settings)
    if dry_run:
        there = len(seeds) - len(_sample_files(run, folder).missing(seeds))
        parts = [f"{len(seeds)} samples, {there} of which are there"] * bool(seeds)
        parts += [f"a film of {min(len(seeds), FILM_SAMPLES)}"] * bool(seeds and options.film)
        parts += [f"{len(pictures)} images encoded"] * bool(pictures)
        parts += [f"a film between {' and '.join(ends)}"] * bool(ends)
        log.info(f"would sample from the EMA weights of step {run.step}, {run.path}, to {folder}")
        log.info("; ".join(parts))
        return
    with open_workdir(workdir, folder, main):
        for line in [decided] * bool(decided) + precisions:
            log.info(line)
        log.info(f"sampling with the EMA weights of step {run.step}, {run.path}")
        if main and not stored:
            save_settings(folder, settings)
        distributed.barrier()
        if seeds:
            _draw_seeds(run, seeds, folder, settings, restored)
        if main and pictures:
            _encode(run, pictures, folder, settings)
        if main and ends:
            _draw_between(run, ends, folder, settings)


@distributed.joined()
def export(
    config,
    workdir: Path,
    outdir: Path | None = None,
    checkpoint: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Write the EMA weights of `checkpoint`, by default the newest, as one file to share.

    It is `model.safetensors` in `outdir`, by default the workdir, and has the config too.

    Raises:
        ValueError: the checkpoint is damaged or does not fit.
        OSError: there is no checkpoint, or the file cannot be written.
    """
    config, _ = complete(config, workdir)
    run = load(checkpoint or workdir, config=config, fits=False)
    path = (outdir or workdir) / f"model{SHARED}"
    if dry_run:
        log.info(f"would export the EMA weights of step {run.step}, {run.path}, to {path}")
    elif distributed.is_main():
        weights = run.experiment.network.state_dict()
        identity = run.experiment.data.stored
        data = identity.entry() if identity else None
        save_shared(path, weights, run_config.flatten(config), run.step, data)
        size = path.stat().st_size / 2**20
        log.info(f"EMA weights of step {run.step}, {run.path}: {path} ({size:.3g} MiB)")


def _sample_files(run: Trained, folder: Path) -> SampleFiles:
    channels, *sides = run.shape
    return SampleFiles(folder, (*sides, channels))


def _settings(config, run: Trained, restored: ToRestore | None) -> dict:
    """Settings that the samples of a folder share, as a flat dictionary."""
    origin = run.experiment.origin()
    del origin["seed"]  # of the training
    if restored:
        origin |= restored.origin(run.experiment.codec.shape)
    return flatten(ConfigDict(origin))


def _read_pictures(config, key: str, names: list[str]) -> dict[str, Picture]:
    """The images of files and folders by name, (H, W, C); ValueError for another size."""
    channels, *size = (config.data.num_channels, config.data.image_size, config.data.image_size)
    pictures: dict[str, Picture] = {}
    for name in names:
        for file, picture in read_images(key, name.strip(), channels, config.data.scale).items():
            if picture.shape[:2] != tuple(size):
                has, needs = (" x ".join(map(str, s)) for s in (picture.shape[:2], size))
                raise ValueError(f"{key}: {file} has {has} pixels, the network's images {needs}")
            pictures[file if file not in pictures else f"{name}:{file}"] = picture
    return pictures


def _draw_seeds(
    run: Trained,
    seeds: list[int],
    folder: Path,
    settings: dict,
    restored: ToRestore | None,
) -> None:
    """The files of the seeds, samples.npz, grid.png and, if asked for, the film."""
    files = _sample_files(run, folder)
    there = len(seeds) - len(files.missing(seeds))
    distributed.barrier()  # nobody writes before all have counted

    def options(batch_seeds: list[int]) -> dict:
        if restored is None:
            return {}
        measurement = restored.measurement
        rows = torch.tensor(batch_seeds, device=measurement.value.device) % len(measurement.value)
        conditions = dict(restored.conditions.map(lambda each: each[rows]))
        return {
            "measurement": measurement[rows],
            "class_label": conditions.pop("class_labels", None),
            "conditions": conditions,
        }

    if run.experiment.config.sampling.film:
        first = seeds[:FILM_SAMPLES]
        if distributed.is_main():

            def draw() -> dict:
                frames = run.film(first, **options(first))
                return {"frames": frames.permute(0, 1, 3, 4, 2).numpy()}

            spec = {"frames": ("u", (None, len(first), *files.shape))}
            frames = cached(folder / "film.npz", settings | {"film": first}, draw, spec)["frames"]
            for seed in files.missing(first):
                files.save(seed, frames[-1][first.index(seed)])
            path = folder / f"film.{run.experiment.config.sampling.film_format}"
            save_film(path, [image_grid(frame) for frame in frames])
            log.info(f"film: {path}")
        distributed.barrier()
    mine = seeds[distributed.rank() :: distributed.world()]
    missing = files.missing(mine)
    if run.at_once == 1 and len(missing) > 1:
        log.info(
            "this sampler has one step size for all it draws, so each sample is drawn alone; "
            "sampling.ode_solver=heun with sampling.N=18 draws them together"
        )
    with progress_bar(total=len(missing), desc="sampling", unit="image") as progress:
        for start in range(0, len(missing), run.at_once):
            batch_seeds = missing[start : start + run.at_once]
            images = to_uint8(run.sample(batch_seeds, **options(batch_seeds)))
            for seed, image in zip(batch_seeds, images, strict=True):
                files.save(seed, image)
            progress.update(len(batch_seeds))
    distributed.barrier()
    if not distributed.is_main():
        return
    images = files.read(seeds)
    labels = options(seeds).get("class_label")
    labels = run.labels(labels, len(seeds), seeds)
    arrays = {} if labels is None else {"labels": labels.cpu().numpy()}
    save_npz(folder / "samples.npz", samples=images, seeds=np.array(seeds), **arrays)
    columns = None if restored is None else min(len(restored.measurement.value), 20)
    save_png(folder / "grid.png", image_grid(images[: evaluation.GRID_SAMPLES], columns))
    log.info(f"{len(seeds)} samples, {there} of which were there: {folder / 'grid.png'}")


def _encode(run: Trained, given: dict[str, Picture], folder: Path, settings: dict) -> None:
    """encoded.npz, latents, bits/dim and reconstruction of each image; encoded.png, pairs."""
    names, pictures = [*given], np.stack([*given.values()])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def encode() -> dict:
        generator = datasets.keyed_generator("cpu", "dequantisation", 0)
        continuous = datasets.to_unit_interval(images, generator, dequantize=True)
        bits = run.bits_per_dim(continuous)
        latents = run.encode(datasets.to_unit_interval(images))
        return {
            "names": np.array(names),
            "latents": latents.cpu().numpy(),
            "bpd": bits.double().cpu().numpy(),
            "decoded": to_uint8(run.decode(latents)),
        }

    shape = run.experiment.codec.shape
    spec = {"latents": ("f", (len(names), *shape)), "bpd": ("f", (len(names),))}
    spec |= {"decoded": ("u", pictures.shape), "names": ("U", (len(names),))}
    origin = settings | digests(encoded=images) | {"names": names}
    origin |= {"divergence": run.experiment.config.eval.divergence}
    found = cached(folder / "encoded.npz", origin, encode, spec)
    for name, bits in zip(names, found["bpd"], strict=True):
        log.info(f"{name}: {bits:.4g} bits/dim")
    columns = min(len(names), 10)
    strips = []
    for start in range(0, len(names), columns):
        pair = [x[start : start + columns] for x in (pictures, found["decoded"])]
        blank = np.full((columns - len(pair[0]), *pictures.shape[1:]), 128, np.uint8)
        strips.append(image_grid(np.concatenate([pair[0], blank, pair[1], blank]), columns))
    path = folder / "encoded.png"
    save_png(path, np.concatenate(strips))
    change = np.abs(found["decoded"].astype(int) - pictures).max()
    log.info(f"images and reconstructions, {change} grey levels apart: {path}")


def _draw_between(run: Trained, ends: dict[str, Picture], folder: Path, settings: dict) -> None:
    """A film along the arc between the latents of two images."""
    images = torch.from_numpy(np.stack([*ends.values()])).permute(0, 3, 1, 2)

    def draw() -> dict:
        latents = run.encode(datasets.to_unit_interval(images))
        shares = torch.linspace(0, 1, FRAMES, device=latents.device)
        (arc,) = sampling.spherical_interpolation(latents[:1], latents[1:], shares)
        return {"frames": to_uint8(run.decode(arc))}

    channels, *sides = run.shape
    origin = settings | digests(between=images)
    spec = {"frames": ("u", (FRAMES, *sides, channels))}
    frames = cached(folder / "between.npz", origin, draw, spec)["frames"]
    path = folder / f"between.{run.experiment.config.sampling.film_format}"
    save_film(path, [image_grid(frame[None], min_size=FILM_PIXELS) for frame in frames])
    log.info(f"film between {' and '.join(ends)}: {path}")


def _check_division(images: int, accumulate: int = 1) -> None:
    shards = distributed.world() * accumulate
    if images % shards:
        raise ValueError(
            f"the {images} images of a step cannot be split evenly into {shards} shards "
            f"({distributed.world()} processes, training.accumulate={accumulate}); change "
            "training.batch_size or training.small_batch_size"
        )


def _resume(config, workdir: Path, state: TrainState) -> list[int]:
    """Load the newest intact state, if any; return the steps of the numbered checkpoints."""
    found = newest_checkpoint(workdir)
    if found is None:
        if distributed.is_main():
            run_config.store(workdir, config)
        return []
    path, content = found
    changes = run_config.changes(path, content, config)
    fit(state.load_state_dict, content, path, changes)
    for change in changes:
        log.warning(f"the config differs from that of the run: {change}")
    return written_steps(content, path)


def _save(
    config,
    data: dict,
    workdir: Path,
    state: TrainState,
    written: list[int],
    numbered: bool = False,
) -> list[int]:
    """Save `state` to resume from and, if `numbered`, to evaluate; return the steps `written`.

    `data` is the identity of the data (`Identity.entry`). Weights that are not finite are not
    saved, since they would replace good ones.
    """
    state.check_agreement()
    if not state.is_finite():
        raise FloatingPointError(f"the weights are not finite at step {state.step}; not saved")
    written = written + [state.step] * numbered
    content = state.state_dict() | {"written": written, "data": data}
    content["config"] = run_config.flatten(config)
    if distributed.is_main() and numbered:
        save_checkpoint(checkpoint_path(workdir, state.step), content)
        written = drop_checkpoints(workdir, written, config.training.keep_checkpoints)
    if distributed.is_main():
        save_to_resume(workdir, content)
    return written


def _held_out_loss(run: Experiment, state: TrainState, data, seed: int) -> float:
    """The loss of the EMA weights on the first batch of `data`, with the same noise every time."""
    batch = datasets.batch_at(data, slice(run.objective.batch_size)).to(run.device)
    batch = replace(batch, images=run.codec.encode(datasets.to_unit_interval(batch.images)))
    generator = datasets.keyed_generator(run.device, "held out", seed)
    shard = distributed.rank(), distributed.world()
    with state.with_ema():
        return held_out_loss(state, batch, generator, shard).item()


class _Stopped(Exception):
    """A signal asks to stop."""


def _draw_snapshot(
    run: Experiment,
    state: TrainState,
    writer: TensorBoardWriter,
    workdir: Path,
    seed: int,
    number: int,
    stop: Callable[[], str | None],
) -> None:
    """At most `number` samples, from the same prior draw at every call, to compare the pictures.

    None where `stop` gives a signal's name before an evaluation of the network.
    """
    step = state.step
    folder = workdir / "samples" / f"iter_{step}"
    generator = datasets.keyed_generator(run.device, "snapshot", seed)
    number = min(SNAPSHOT_SAMPLES, number)
    try:
        with state.with_ema(), solver_bar(run.method) as show:

            def watch(evaluations: int, sigma: float) -> None:
                show(evaluations, sigma)
                if stop():
                    raise _Stopped

            conditions = run.draw_conditions(number, "snapshot")
            samples, nfe = run.sampler(
                run.network, number, generator=generator, conditions=conditions, watch=watch
            )
    except _Stopped:
        log.info(f"step {step}: no samples drawn: {stop()}; the next start draws them")
        return
    except FloatingPointError as error:  # a network that is still young may have no smooth flow
        log.warning(f"step {step}: no samples drawn: {error}")
        return
    images = to_uint8(samples)
    grid = image_grid(images)
    save_npz(folder / "sample.npz", samples=images)
    save_png(folder / "sample.png", grid)
    writer.add_image("samples", grid, step)
    log.info(f"step {step}: samples in {nfe} evaluations: {folder / 'sample.png'}")


class _Watch:
    """Looks at the losses of several steps at once, so that no step waits for its device."""

    def __init__(self, max_bad_steps: int, nonfinite: str):
        self.nonfinite = nonfinite
        self.limit, self.bad_in_a_row, self.newest = max_bad_steps, 0, math.nan
        self.losses: dict[int, Tensor] = {}  # by the batch's number, since the last look

    def add(self, batch: int, loss: Tensor) -> None:
        """Notes the loss of a step on batch number `batch`, as `train_step` returns it."""
        self.losses[batch] = loss
        if len(self.losses) >= self.limit:
            self.look()

    def look(self) -> float:
        """The newest loss. Warns of each that is not finite, raises at `max_bad_steps` in a row."""
        if not self.losses:
            return self.newest
        losses = distributed.mean(torch.stack([*self.losses.values()])).tolist()
        for batch, loss in zip(self.losses, losses, strict=True):
            self.newest = loss
            self.bad_in_a_row = 0 if math.isfinite(loss) else self.bad_in_a_row + 1
            if self.bad_in_a_row:
                log.warning(
                    f"batch {batch}: the loss or its gradient is not finite "
                    f"(optim.nonfinite={self.nonfinite!r}, {self.bad_in_a_row} in a row)"
                )
            if self.bad_in_a_row == self.limit:
                raise FloatingPointError(
                    f"the loss or its gradient was not finite for training.max_bad_steps="
                    f"{self.limit} batches in a row, the last one number {batch}; the weights "
                    "before them are not ruined, and the last checkpoint is intact"
                )
        self.losses = {}
        return self.newest


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], str | None]]:
    """Within the block SIGTERM and SIGINT only ask to stop; a second one ends the process at once.

    Yields a function that gives the name of the signal received, or None. Where another thread
    than the main one runs this, which cannot handle signals, they do what they did.
    """
    received = []

    def receive(number: int, frame) -> None:
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
