"""The modes of main.py: a look at the data, training, evaluation, sampling, export."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from ml_collections import ConfigDict

import datasets
import distributed
import evaluation
import execution
import sampling
from completion import PRECISIONS_OF_RUN, complete
from configs.keys import flatten
from experiment import Experiment, identity_of, load
from library import report_settings, training_metrics
from library.ema import rebuild_ema
from library.evaluated import Evaluated, Split
from library.evaluated_pairs import compare_pairs
from library.evaluated_restorations import restore_images
from library.evaluated_samples import compare_samples, draw_images
from library.first_look import FirstLook
from library.initial_weights import entry_of_report
from library.loss_watch import LossWatch
from library.posterior import ToDrawFrom
from library.restoration import ToRestore
from library.sample_folder import SampleFolder, default_seeds, read_encoded, read_pair, seeds_of
from library.signals import stop_signals
from library.step_cost import Cost
from library.training_run import TrainingRun, plan_of, resumed_from
from losses import objective_named
from methods import method_class
from metrics.reference import ReferenceStatistics
from models.weights import load_ema
from reports.drawings import draw_classes, draw_interpolation, draw_rescaling
from reports.evaluation_page import save_page
from reports.films import check_writer
from reports.progress import progress_bar
from reports.settings import to_json
from reports.table import report_table
from sources.codec import check_codec
from storage import run_config
from storage.checkpoints import fit
from storage.files import save_npz
from storage.loggers import Loggers
from storage.run_checkpoints import (
    checkpoints_of_steps,
    checkpoints_to_evaluate,
    open_unless_removed,
)
from storage.shared_files import SHARED, save_shared
from storage.workdir import check_writable, evaluation_folder, open_workdir
from training import train_step

log = logging.getLogger(__name__)


@distributed.joined()
def train(config, workdir: Path, dry_run: bool = False) -> bool:
    """Train until step `training.n_iters`, from where the workdir's last run stopped.

    Of several processes each takes its shard of a step's examples, and the main one writes. A
    `dry_run` says what would be done, and writes nothing.

    Returns:
        True at the last step; False where SIGTERM or SIGINT ended it before, with all saved.

    Raises:
        ValueError: the config is wrong, or the workdir's checkpoints do not fit it.
        OSError: a file cannot be written, or another process trains in the workdir.
        FloatingPointError: `training.max_bad_steps` batches in a row gave no finite gradient, or
            the processes do not agree.
    """
    experiment = Experiment.of_run(config, workdir, identity_of(workdir))
    config, main, device = experiment.config, distributed.is_main(), experiment.device
    training, objective = config.training, experiment.objective
    execution.check_precision(training.precision, device)
    execution.prepare_process(training.precision, device)
    experiment.sampler = sampling.for_snapshots(experiment.sampler, training.snapshot_solver)
    prepare = experiment.preparation
    data = experiment.data.identity_of_run().entry() if main and not dry_run else {}
    train_data = experiment.data.get("train", whole=True)
    test_data = experiment.data.get("test")
    names = getattr(train_data, "names", ())
    distributed.check_same("data", f"{len(train_data)} and {len(test_data)} images {names}")
    shard = distributed.rank(), distributed.world()
    plan = plan_of(experiment, len(train_data))
    remarks = [
        experiment.data.describe(train_data, test_data, prepare.words),
        *getattr(experiment.network, "remarks", ()),
        *experiment.remarks,
    ]
    train_data, prepare = experiment.training_set(train_data)
    images_per_step = min(objective.examples, len(train_data))
    on_disk = isinstance(train_data, datasets.Stream)  # each process decodes its shard of a batch
    distributed.check_division(images_per_step, training.accumulate)
    if on_disk:
        distributed.check_division(min(objective.batch_size, len(train_data)))
    config.data.changed = "refuse"  # the permission is for this start, and not stored
    if dry_run:
        step, lines = resumed_from(workdir, experiment, flatten(config))
        log.info(f"would train from step {step} to {training.n_iters} in {workdir}: {plan}")
        cost = Cost.from_config(config, experiment, train_data, prepare)
        _log_lines([*lines, *remarks, cost.line])
        experiment.data.close()
        return True
    run = TrainingRun.from_config(config, experiment, workdir, data)
    state = run.state

    with _opened(workdir, workdir / "checkpoints", "--workdir"):
        run.resume()
        state.check_agreement()
        start = f"{'resuming' if state.step else 'starting'} at step {state.step}"
        _log_lines([f"{start} of {training.n_iters}: {plan}", *remarks])
        experiment.data.close()
        first, draws = state.step + 1, training.snapshot_sampling
        batches = datasets.shuffled_batches(
            train_data, objective.batch_size, config.seed, state.step, shard if on_disk else (0, 1)
        )
        nonfinite, precision = config.optim.nonfinite, training.precision
        losses = LossWatch(training.max_bad_steps, nonfinite, precision)
        logged, logged_at = state.step, time.perf_counter()
        with (
            Loggers(training.loggers if main else "", workdir, state.step, run.values) as loggers,
            progress_bar(total=training.n_iters, initial=state.step, unit="step") as progress,
            stop_signals() as stop,
            distributed.watched(training.hang_seconds),
            run.writer,
        ):
            # a run that was stopped before it had drawn lacks its last picture or metrics
            if draws and state.step and run.picture_is_due() and run.lacks_picture():
                run.draw(loggers, images_per_step, stop)
            loggers.add_scalars(run.measure(stop), state.step)
            while state.step < training.n_iters and not distributed.any_of(bool(stop())):
                generator = datasets.keyed_generator(device, "training", config.seed, state.step)
                # dropout knows no other generator than the global one
                torch.manual_seed(datasets.keyed_seed("dropout", config.seed, state.step, shard[0]))
                batch = next(batches).to(device, non_blocking=True)
                if on_disk:
                    batch = batch.map(distributed.gather)
                batch = prepare(batch, generator)
                losses.add(state.step, train_step(state, batch, generator, shard))
                progress.update()

                scalars = {}
                if run.is_due(training.log_freq):
                    newest, now = losses.look(), time.perf_counter()  # it waits for the device
                    run.writer.check()
                    speed = (state.step - logged) * images_per_step / (now - logged_at)
                    logged, logged_at = state.step, now
                    progress.set_postfix_str(f"loss {newest:.4g}, {speed:.0f} images/s")
                    phase = objective.phase(state.step - 1)
                    scalars = {"loss/train": newest} | ({f"loss/{phase}": newest} if phase else {})
                    scalars["images_per_second"] = speed
                paused_at = time.perf_counter()
                if state.step == first:  # processes that go apart do so in their first step
                    state.check_agreement()
                if run.is_due(training.eval_freq):
                    scalars["loss/test"] = held_out = run.held_out_loss(test_data)
                    log.info(f"step {state.step}: held-out loss {held_out:.5g}")
                loggers.add_scalars(scalars | run.measure(stop), state.step)
                numbered = run.is_due(training.snapshot_freq)
                if numbered or run.is_due(training.snapshot_freq_for_preemption):
                    loggers.flush()
                    run.save(numbered)
                if draws and run.picture_is_due():
                    run.draw(loggers, images_per_step, stop)
                logged_at += time.perf_counter() - paused_at  # the speed is that of the steps

            if state.step < training.n_iters:
                run.save()
                run.writer.wait()
                losses.look()
                log.info(f"stopped by {stop() or 'a signal'} at step {state.step}, which is saved")
                return False
        log.info(f"trained to step {state.step}; checkpoints are in {workdir / 'checkpoints'}")
        return True


@distributed.joined()
def look_at_data(config, workdir: Path, outdir: Path | None = None, dry_run: bool = False) -> None:
    """Write `data.html` to `outdir`, by default the workdir: the data as a training sees them.

    It takes a few steps, to estimate their cost. A `dry_run` only says where it would write.
    ValueError where the config or the data are wrong, OSError where a file is.
    """
    experiment = Experiment.of_run(config, workdir, identity_of(workdir))
    folder = outdir or workdir
    if dry_run:
        log.info(f"would look at the data, and write {folder / 'data.html'}")
        return
    look = FirstLook.from_config(experiment.config, experiment)
    _log_lines([look.line, *experiment.remarks])
    look.save(folder / "data.html", f"{workdir.resolve().name}: data")


@distributed.joined()
def evaluate(config, workdir: Path, eval_folder: str = "eval", dry_run: bool = False) -> None:
    """Evaluate the checkpoints of `eval.steps`, or `begin_ckpt` to `end_ckpt`, with EMA weights.

    A `dry_run` says what would be done, and writes nothing.

    An evaluation that was interrupted continues: a file is used again if the same weights and
    settings made it. Several processes share the batches of bits/dim and the rounds of samples; the
    rest is the main one's.

    Raises:
        ValueError: the config is wrong, or a checkpoint is damaged or does not fit it.
        OSError: there is no checkpoint, a file cannot be written, or another process writes to
            the folder.
        FloatingPointError: the ODE of a likelihood cannot be solved, or that of samples not within
            `sampling.max_evaluations`.
    """
    identity = identity_of(workdir, config.data.dataset)
    experiment = Experiment.of_run(config, workdir, identity, PRECISIONS_OF_RUN)
    config, main, sampler = experiment.config, distributed.is_main(), experiment.sampler
    options, training, restore = config.eval, config.training, config.sampling.restore
    execution.prepare_process(training.precision, experiment.device)
    parts = evaluation.parts_of(options, config.sampling, experiment.classes)
    folder = evaluation_folder(workdir, eval_folder)
    checkpoints = (
        checkpoints_of_steps(workdir, options.steps, training.snapshot_freq)
        if options.steps
        else checkpoints_to_evaluate(
            workdir, options.begin_ckpt, options.end_ckpt, training.snapshot_freq, training.n_iters
        )
    )
    distributed.check_same("checkpoints", " ".join(path.name for path in checkpoints.values()))
    split, statistics, restored = None, [], None
    if any(map(options.get, evaluation.SPLIT_PARTS)):
        split = Split.from_config(config, experiment.data)
    if options.enable_bpd or options.enable_classification:
        experiment.check_likelihood()
    for part in filter(options.get, evaluation.ALONG_LATENTS):
        experiment.check_ode(f"eval.{part}")
    draws = any(map(options.get, evaluation.DRAWN))
    if draws:
        experiment.draw_conditions(1, "check")  # raises where there is no label to sample with
    if options.enable_sampling:
        statistics = ReferenceStatistics.from_config(
            config, experiment.device, experiment.data, experiment.codec
        )
    if restore:
        restored = ToRestore.from_config(config, experiment)
    if dry_run:
        for path in checkpoints.values():
            log.info(f"would evaluate {path} on {experiment.device}: {', '.join(parts)}")
        log.info(f"the results would be in {folder}")
        experiment.data.close()
        return
    with _opened(workdir, folder, "--eval_folder=/another/folder", experiment.remarks):
        experiment.data.close()
        for each in statistics if main else ():
            if each.reference is None:
                with progress_bar(total=len(each.data), desc="data", unit="image") as progress:
                    each.measure(progress.update)
        logged_changes, evaluated = [], None
        for k, path in checkpoints.items():
            content = open_unless_removed(path)
            if distributed.any_of(content is None):
                continue
            check_codec(experiment.codec, content, path)
            changes = run_config.changes(path, content, flatten(config))
            step = fit(partial(load_ema, experiment.network), content, path, changes)
            if options.enable_loss:  # an objective may have learned weights too
                fit(experiment.load_objective, content, path, changes)
            experiment.network.eval()
            experiment.objective.eval()
            for change in [] if logged_changes == changes else changes:
                log.info(f"the config differs from that of the run: {change}")
            logged_changes = changes
            report, width = {"step": step, **entry_of_report(path, content)}, ""
            report |= training_metrics.entry_of_report(path, content)
            if options.ema_std:
                report["ema_std"], width = options.ema_std, f" of width {options.ema_std:g}"
                ema = rebuild_ema(experiment.network, options.ema_std, workdir, path, content)
                log.info(f"{path.name}: {ema}")
            log.info(f"evaluating {path} on {experiment.device}")
            start, origin = time.perf_counter(), experiment.origin()
            evaluated = Evaluated(
                experiment=experiment,
                folder=folder,
                k=k,
                step=step,
                origin=origin,
                seed=config.seed,
                batch_size=options.batch_size,
            )
            experiment.sampler = sampler
            if draws:
                experiment.sampler = experiment.fitted_sampler(path)
            made_by = report_settings.from_config(config, evaluated, split, statistics, restored)
            report["settings"] = to_json(made_by)
            if main:
                evaluated.remove_results(of_best="best" in report)
            if options.enable_bpd:
                report |= evaluation.bits_per_dim(evaluated, split, options.bpd_num_repeats)
            if options.enable_classification:
                report |= evaluation.classification(evaluated, split)
            if options.enable_sampling:
                number, repeats = options.num_samples, options.repeats
                report |= compare_samples(evaluated, statistics, number, repeats)
            if options.enable_pairs:
                report |= compare_pairs(evaluated, split, options.pairs, options.pair_draws)
            if restored:
                report |= restore_images(evaluated, restored)
            if not main:
                continue
            if options.enable_loss:
                report |= evaluation.loss(evaluated, split, training.batch_size)
            if options.save_images and not options.enable_sampling:
                draw_images(evaluated, options.num_samples)
            if options.enable_sampling or options.save_images:
                draw_classes(experiment, config.seed, evaluated.picture("classes"))
            if options.enable_interpolate:
                draw_interpolation(experiment, config.seed, evaluated.picture("interpolation"))
            if options.enable_rescale:
                rescale = evaluated.picture("rescale")
                draw_rescaling(experiment, config.seed, rescale, options.rescale_norms)
            experiment.data.close()
            report["seconds"] = time.perf_counter() - start
            save_npz(folder / f"report_{k}.npz", **report)
            save_page(experiment, workdir, folder, k, **experiment.facts)
            title = f"{path.name}, EMA weights{width} of step {step}"
            log.info(report_table(report, options.dataset, title))
            log.info(f"report: {folder / f'report_{k}.npz'}, {folder / 'report.html'}")
        if evaluated is None:
            raise FileNotFoundError(f"no checkpoint is left of those to evaluate, up to {path}")


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
    config, data, remarks = complete(config, workdir, precisions=PRECISIONS_OF_RUN)
    options, main = config.sampling, distributed.is_main()
    if options.film or options.between:
        check_writer(options.film_format)
    seeds = seeds_of(options.seeds or default_seeds(options))
    for key in filter(options.get, ("encode", "between", "restore")):
        objective_named(config.training.objective).check_ode(f"sampling.{key}")
        method_class(config.training.sde).check_ode(f"sampling.{key}")
    stored = config.data.scale, config.data.layout if config.data.dtype else ""
    shape = data.shape[0], *(options.size or data.shape[1:])
    pictures = read_encoded(options.encode, shape, *stored)
    ends = read_pair(options.between, shape, *stored)
    source = ToDrawFrom.from_config(config, shape[1:]) if seeds else None
    trained = load(checkpoint or workdir, config=config, fits=not dry_run)  # a fit takes time
    experiment = trained.experiment
    execution.prepare_process(config.training.precision, experiment.device)
    if pictures or ends:
        trained.conditions_of(None, 1)  # raises where the network needs more conditions of images
    origin = experiment.origin()
    distributed.check_same("weights", origin["weights"])
    del origin["seed"]  # of the training
    if options.restore:
        source = ToRestore.from_config(config, experiment)
    origin |= source.origin(experiment.codec.shape) if source else {}
    path = outdir.absolute() if outdir else workdir / "samples" / f"step_{trained.step}"
    values = flatten(ConfigDict(origin))
    folder = SampleFolder(trained, path, values, source, options.film_format, options.npz)
    is_begun = folder.check()
    weights = f"the EMA weights of step {trained.step}, {trained.path}"
    if dry_run:
        log.info(f"would sample from {weights}, to {path}")
        log.info(folder.plan(seeds, options.film, pictures, ends))
        return
    with _opened(workdir, path, "--outdir", remarks + experiment.remarks):
        log.info(f"sampling with {weights}")
        if main and not is_begun:
            folder.save_settings()
        distributed.barrier()
        if seeds:
            folder.draw(seeds, options.film)
        if main and pictures:
            folder.encode(pictures, config.eval.divergence)
        if main and ends:
            folder.draw_between(ends)


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
    config, *_ = complete(config, workdir, precisions=())
    chooses_levels = config.sampling.method == "consistency"
    trained = load(checkpoint or workdir, config=config, fits=chooses_levels and not dry_run)
    path, experiment = (outdir or workdir) / f"model{SHARED}", trained.experiment
    words = f"EMA weights of step {trained.step}, {trained.path}"
    if dry_run:
        log.info(f"would export the {words}, to {path}")
    elif distributed.is_main():
        check_writable(path.parent, "--outdir")
        weights, identity = experiment.network.state_dict(), experiment.data.stored
        entry = identity.entry() if identity else None
        if chooses_levels:
            config.sampling.levels = experiment.sampler.levels
        save_shared(path, weights, flatten(config), trained.step, entry)
        log.info(f"{words}: {path} ({path.stat().st_size / 2**20:.3g} MiB)")


@contextlib.contextmanager
def _opened(workdir: Path, folder: Path, flag: str, remarks: Sequence[str] = ()) -> Iterator[None]:
    """Within the block only this run writes to `folder`, named by `flag`; `remarks` are logged."""
    with open_workdir(workdir, folder, distributed.is_main(), flag):
        distributed.barrier()  # nobody writes before the main process holds the lock
        _log_lines(remarks)
        yield


def _log_lines(lines: Sequence[str]) -> None:
    for line in lines:
        log.info(line)
