"""The tasks of training other than its steps: saves, held-out loss, pictures, metrics."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import distributed
import execution
from configs.keys import flatten
from datasets import DataSet, batch_at
from experiment_parts import Parts
from library.initial_weights import INIT_FROM, InitialWeights, initialise, recall
from library.training_metrics import Best, FewSamples, metrics_of, noise_of
from metrics.table import Comparison
from models.weights import load_ema
from processes.watch import did
from reports.images import image_grid
from reports.progress import solver_bar
from solvers.base import Watch
from sources.codec import check_codec, encoded
from sources.keyed import keyed_generator
from storage import run_config
from storage.checkpoint_writer import CheckpointWriter
from storage.checkpoints import fit, open_checkpoint, save_checkpoint
from storage.files import save_npz, save_png
from storage.loggers import Loggers
from storage.run_checkpoints import (
    newest_checkpoint,
    passed_over,
    save_state,
    written_steps,
)
from storage.workdir import best_path
from training import TrainState, held_out_loss

log = logging.getLogger(__name__)

SNAPSHOT_SAMPLES = 64  # images drawn with every snapshot


WORSE = 2  # standard deviations above the best at which a warning is logged

Stop = Callable[[], str | None]  # gives the name of a signal to stop, if there was one


class _Stopped(Exception):
    """A signal's request to stop."""


@dataclass
class TrainingRun:
    """A run during its training.

    Attributes:
        experiment: its sampler is that of the pictures.
        state: what the steps change.
        workdir: where it is saved.
        values: the config that checkpoints carry, flat.
        data: the entry of checkpoints on the identity of the data (`Identity.entry`).
        seed: of held-out losses and pictures.
        keep_checkpoints: newest numbered checkpoints that are kept; 0: all.
        written: the steps of the numbered checkpoints.
        initial_weights: the weights of another model that the run started from; None: new weights.
        few_samples: samples for metrics during training, if there are such metrics.
        measured: the last step with such metrics.
        best: the best checkpoint by them.
        writer: writes the states that are saved, in a thread.
    """

    experiment: Parts
    state: TrainState
    workdir: Path
    values: dict[str, Any]
    data: dict[str, Any]
    seed: int
    keep_checkpoints: int = 0
    written: list[int] = field(default_factory=list)
    initial_weights: InitialWeights | None = None
    few_samples: FewSamples | None = None
    measured: int = 0
    best: Best | None = None
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)

    @classmethod
    def from_config(cls, config, experiment: Parts, workdir: Path, data: dict[str, Any]) -> Self:
        """The run of `config` in `workdir`, at its start; see `resume`."""
        training, network = config.training, experiment.network
        state = TrainState.from_config(config, network, experiment.objective)
        state.network = execution.for_training(
            network,
            training.precision,
            training.channels_last,
            training.compile,
            some_unused=not config.model.conditional,  # published networks have unused layers then
        )
        values, keep = flatten(config), training.keep_checkpoints
        few_samples = FewSamples.from_config(config, experiment)
        run = cls(experiment, state, workdir, values, data, config.seed, keep)
        run.few_samples, run.writer = few_samples, CheckpointWriter(experiment.device)
        return run

    def resume(self) -> None:
        """Load the newest intact state, if there is one, else start and store the config.

        Raises ValueError where the state does not fit, and as `initialise`.
        """
        newest = newest_checkpoint(self.workdir)
        if newest is None:
            lines = passed_over(self.workdir)
            if name := self.values[INIT_FROM]:
                self.initial_weights, *lines = initialise(self.state.model, name, self.values)
                self.state.restart_averages()
            if distributed.is_main():
                run_config.store(self.workdir, self.values)
            for line in lines:
                log.info(line)
            return
        path, content = newest
        changes = run_config.changes(path, content, self.values)
        self.initial_weights, lines = recall(path, content, self.values)
        for line in lines:
            log.info(line)
        check_codec(self.experiment.codec, content, path)
        fit(self.state.load_state_dict, content, path, changes)
        for change in changes:
            log.warning(f"the config differs from that of the run: {change}")
        self.written = written_steps(content, path)
        self.measured, self.best = content.get("measured", 0), self._best_so_far(changes)
        if distributed.is_main() and self.state.step and self.experiment.data.stored is None:
            log.info(
                "the run does not say what its data were; from here on they are these, digest "
                f"{self.data['digest']}"
            )

    def save(self, numbered: bool = False) -> None:
        """Let the writer save the state, for resuming and, if `numbered`, also for evaluation.

        Raises FloatingPointError where weights are not finite, since they would replace good ones;
        and OSError where the previous state could not be written.
        """
        state = self.state
        state.check_agreement()
        if not state.is_finite():
            raise FloatingPointError(f"the weights are not finite at step {state.step}; not saved")
        written, keep = self.written + [state.step] * numbered, self.keep_checkpoints
        content = self._content(written)
        if distributed.is_main():
            write = partial(save_state, self.workdir, numbered=numbered, keep=keep)
            state.copied = self.writer.save(content, write)
        self.written = written[-keep:]  # all of them where it is 0
        did(f"the save at step {state.step}")

    def _content(self, written: list[int]) -> dict[str, Any]:
        """The content of a checkpoint, with the steps of the numbered ones; see `state_dict`."""
        content = self.state.state_dict() | {"written": written, "data": self.data}
        content["config"] = self.values
        if self.values["data.codec"] or self.values["data.dtype"]:
            content["codec"] = self.experiment.codec.identity
        if self.initial_weights:
            content["init_from"] = self.initial_weights.entry()
        if self.few_samples:
            content["measured"] = self.measured
        return content

    def held_out_loss(self, data: DataSet) -> float:
        """Loss of the EMA weights on the first batch of `data`, with the same noise every time."""
        experiment = self.experiment
        batch = batch_at(data, slice(experiment.objective.batch_size)).to(experiment.device)
        batch = replace(batch, images=encoded(experiment.codec, batch.images))
        generator = keyed_generator(experiment.device, "held out", self.seed)
        shard = distributed.rank(), distributed.world()
        self.state.gather_ema()
        with self.state.with_ema():
            return held_out_loss(self.state, batch, generator, shard).item()

    def is_due(self, every: int) -> bool:
        """Whether this step is the last one, or a multiple of `every`."""
        return self.state.step == self.values["training.n_iters"] or self.state.step % every == 0

    def picture_is_due(self) -> bool:
        """Whether this step has a picture of samples.

        The last step has one, and the first numbered checkpoint in each `training.picture_freq`.
        """
        step, freq = self.state.step, self.values["training.snapshot_freq"]
        fewest = self.values["training.picture_freq"]
        is_first = step % freq == 0 and step // fewest > (step - freq) // fewest
        return is_first or step == self.values["training.n_iters"]

    @property
    def picture(self) -> Path:
        """The path of the picture of this step's samples."""
        return self.workdir / "samples" / f"iter_{self.state.step}" / "sample.png"

    def lacks_picture(self) -> bool:
        """Whether there is no picture of this step yet; the processes agree."""
        return distributed.any_of(distributed.is_main() and not self.picture.exists())

    def draw(self, loggers: Loggers, number: int, stop: Stop) -> None:
        """Save a picture of at most `number` samples, from the same prior draw at every call.

        Nothing is saved where `stop` names a signal before the picture is done, or the solver
        diverges. Every process has to call it; the main one draws.
        """
        self.state.gather_ema()
        if stop() or not distributed.is_main():
            return
        experiment, step, samples = self.experiment, self.state.step, None
        generator = keyed_generator(experiment.device, "snapshot", self.seed)
        number = min(SNAPSHOT_SAMPLES, number)
        with self._drawing("samples", stop) as watch:
            conditions = experiment.draw_conditions(number, "snapshot")
            samples, nfe = experiment.sampler(
                experiment.network, number, generator=generator, conditions=conditions, watch=watch
            )
        if samples is None:
            return
        finite = samples.flatten(1).isfinite().all(1)  # field lines are given up one by one
        if lost := int((~finite).sum()):
            log.warning(f"step {step}: {lost} of {number} samples are not finite, nor shown")
        if lost == number:
            return
        stored = experiment.codec.stored(samples[finite])
        grid = image_grid(experiment.codec.pictures(stored))
        save_npz(self.picture.with_suffix(".npz"), samples=stored)
        save_png(self.picture, grid)
        loggers.add_image("samples", grid, step)
        log.info(f"step {step}: samples in {nfe} evaluations: {self.picture}")

    @contextlib.contextmanager
    def _drawing(self, what: str, stop: Stop) -> Iterator[Watch]:
        """Give the network its EMA weights within the block, which draws samples with the `watch`.

        A signal that `stop` names and a solver that diverges end the block, and the log says so.
        """
        step = self.state.step
        try:
            with self.state.with_ema(), solver_bar(self.experiment.method) as show:

                def watch(evaluations: int, sigma: float) -> None:
                    show(evaluations, sigma)
                    did(f"evaluation {evaluations} of {what} at step {step}")
                    if stop():
                        raise _Stopped

                yield watch
        except _Stopped:
            log.info(f"step {step}: no {what} drawn: {stop()}; the next start draws them")
        except FloatingPointError as error:  # a network that is still young may have no smooth flow
            log.warning(f"step {step}: no {what} drawn: {error}")

    def measure(self, stop: Stop) -> dict[str, float]:
        """Metrics of a few samples of the EMA weights, by tag; a state with the best ones is saved.

        Returns {} in a step without metrics, in processes other than the main one, where `stop`
        names a signal before the metrics are done, and where the solver diverges. Every process has
        to call it.
        """
        freq, first = self.values["training.metric_freq"], self.measured != self.state.step
        if not (freq and self.is_due(freq) and first):
            return {}
        self.state.gather_ema()
        comparison = None
        if distributed.is_main() and not stop():
            with self._drawing("samples for metrics", stop) as watch:
                comparison = self.few_samples.compare(watch)
        if comparison or not stop():
            self.measured = self.state.step
        values = metrics_of(comparison) if comparison else {}
        if distributed.any_of("fid" in values and self._is_best(values["fid"], comparison)):
            self._save_best()
        return {f"metrics/{key}": value for key, value in values.items()}

    def _save_best(self) -> None:
        """Save the state as the best one; every process has to call it."""
        step, path = self.state.step, best_path(self.workdir)
        content = self._content([number for number in self.written if number < step])
        if distributed.is_main():
            self.writer.wait()  # the state names numbered checkpoints, which must exist by then
            save_checkpoint(path, content | {"best": self.best.entry()})
            log.info(f"step {step}: {self._distance(self.best.fid)}, the lowest so far: {path}")

    def _distance(self, fid: float) -> str:
        return f"Fréchet distance {fid:.4g} of {self.few_samples.number:,} samples"

    def _is_best(self, fid: float, comparison: Comparison) -> bool:
        """Whether the state's distance is the lowest so far; else the log says how it compares."""
        step, best, distance = self.state.step, self.best, self._distance(fid)
        if best is None or fid < best.fid:
            self.best = self.few_samples.best(step, fid)
            return True
        noise, lowest = noise_of(comparison), f"{best.fid:.4g} of step {best.step}"
        if (excess := fid - best.fid) > WORSE * noise:
            log.warning(
                f"step {step}: the samples have become worse: {distance}, {excess:.2g} above "
                f"{lowest}; the noise of so few samples is {noise:.2g}"
            )
        else:
            log.info(f"step {step}: {distance}, equal to {lowest} within its noise, {noise:.2g}")
        return False

    def _best_so_far(self, changes: list[str]) -> Best | None:
        """The best checkpoint of earlier starts, if those to come can be compared with it.

        One of a later step than this belongs to the run if it takes the same steps again.
        """
        path = best_path(self.workdir)
        if self.few_samples is None or not path.exists():
            return None
        try:
            best = Best.read(path, open_checkpoint(path))
        except (OSError, ValueError) as error:
            log.warning(f"{error}; the next metrics replace it")
            return None
        is_of_run = best is not None and (best.step <= self.state.step or not changes)
        if is_of_run and self.few_samples.are_comparable(best):
            return best
        log.info(f"{path} is of other samples or other steps; the next metrics replace it")
        return None


def plan_of(experiment: Parts, images: int) -> str:
    """The method, number of `images`, size of the network, device and processes, in words."""
    parameters = sum(p.numel() for p in experiment.network.parameters())
    world = distributed.world()
    processes = f", {world} processes" if world > 1 else ""
    return (
        f"{experiment.method.name}, {images:,} images, {parameters:,} parameters, "
        f"{experiment.device}{processes}"
    )


def resumed_from(workdir: Path, experiment: Parts, values: dict[str, Any]) -> tuple[int, list[str]]:
    """The step from which training would go on, and lines on what it would ignore or change.

    The checkpoint's EMA weights are copied into the network; of all that it has, no other tensors
    are loaded. `values` is the config, flat. Raises ValueError where the checkpoint does not fit,
    and as `initialise`.
    """
    read = partial(open_checkpoint, intact=True)
    newest = newest_checkpoint(workdir, set_aside=False, read=read)
    if newest is None:
        if name := values[INIT_FROM]:
            return 0, [initialise(experiment.network, name, values)[1]]
        return 0, passed_over(workdir)
    path, content = newest
    check_codec(experiment.codec, content, path)
    changes = run_config.changes(path, content, values)
    _, lines = recall(path, content, values)
    step = fit(partial(load_ema, experiment.network), content, path, changes)
    lines += [f"the config differs from that of the run: {change}" for change in changes]
    return step, lines
