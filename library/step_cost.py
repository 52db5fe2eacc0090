"""The time and memory of a training step, estimated from steps with a part of its examples."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

import distributed
from datasets import DataSet, batch_at, keyed_generator
from experiment_parts import Parts
from library.training_run import TrainingRun
from sources.batch import Batch
from sources.preparation import Preparation
from training import TrainState, train_step

ENOUGH = 0.25  # seconds of a step from which those of larger ones follow


@dataclass(frozen=True)
class Cost:
    """What a training costs.

    Attributes:
        seconds: of a step.
        memory: the most bytes that a step needs, of a GPU or else of the whole program.
        images: number of images whose loss a step computes, in all processes.
        steps: number of steps of the training.
        device: where it takes place.
    """

    seconds: float
    memory: int
    images: int
    steps: int
    device: torch.device

    @classmethod
    def from_config(cls, config, experiment: Parts, data: DataSet, prepare: Preparation) -> Self:
        """The estimated cost of training the network of `experiment` on `data`, not compiled.

        The network is changed.
        """
        config = config.copy_and_resolve_references()
        config.training.compile = False
        state = TrainingRun.from_config(config, experiment, Path(), {}).state
        batch = batch_at(data, slice(experiment.objective.batch_size)).to(experiment.device)
        generator = keyed_generator(experiment.device, "training", config.seed, 0)
        return estimate(state, batch, prepare, generator)

    @property
    def words(self) -> dict[str, str]:
        """The costs in words, by what they are of."""
        of = "the GPU" if self.device.type == "cuda" else "the whole program"
        return {
            "a step": f"{self.seconds:.3g} s for {self.images:,} images on {self.device}",
            f"{self.steps:,} steps": _duration(self.seconds * self.steps),
            "memory": f"{self.memory / 2**30:.2g} GiB of {of}",
        }

    @property
    def line(self) -> str:
        """The line of the log."""
        return "estimated: " + ", ".join(f"{name} {words}" for name, words in self.words.items())


def estimate(
    state: TrainState, batch: Batch, prepare: Preparation, generator: torch.Generator
) -> Cost:
    """The cost of a step of this process on `batch`, images as stored.

    Steps with ever larger parts of a micro-batch are taken, until one takes `ENOUGH` seconds or has
    a whole micro-batch; the cost of the whole step is on the line through the last two. They change
    `state`.
    """
    examples = min(state.objective.examples, len(batch))
    micro_batches = distributed.world() * state.accumulate
    accumulate, state.accumulate = state.accumulate, 1
    costs = []  # number of examples, seconds, memory, bytes kept for the backward pass
    for parts in reversed([*_halved(examples, micro_batches)]):
        for _ in range(2):  # the first one also initialises libraries
            seconds, memory, kept = _measured_step(state, batch, prepare, generator, parts)
        costs.append((examples // parts, seconds, memory, kept))
        if seconds > ENOUGH:
            break
    state.accumulate = accumulate
    number, seconds, memory, kept = costs[-1]
    before, seconds_before, *_ = costs[-2] if len(costs) > 1 else (0, 0.0)
    of_an_example = max(0.0, (seconds - seconds_before) / (number - before))
    micro_batch = examples // micro_batches
    return Cost(
        seconds + of_an_example * (micro_batch * accumulate - number),
        memory + kept * (micro_batch - number) // number,
        examples,
        state.schedule["n_iters"],
        state.parameters[0].device,
    )


def _halved(examples: int, parts: int) -> Iterator[int]:
    """Numbers of equal parts of the `examples`: `parts`, and twice as many again and again."""
    while examples % parts == 0:
        yield parts
        parts *= 2


def _measured_step(
    state: TrainState,
    batch: Batch,
    prepare: Preparation,
    generator: torch.Generator,
    parts: int,
) -> tuple[float, int, int]:
    """Seconds, most memory and bytes kept for backward of a step on one of `parts` shards."""
    device = state.parameters[0].device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with _kept_bytes(state.parameters) as kept:
        train_step(state, prepare(batch, generator), generator, (0, parts)).item()  # it waits
    seconds = time.perf_counter() - start
    if on_gpu:
        return seconds, torch.cuda.max_memory_allocated(device), sum(kept.values())
    unit = 1 if sys.platform == "darwin" else 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return seconds, most, sum(kept.values())


@contextmanager
def _kept_bytes(parameters: list[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps within the block, by address, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{float(f'{seconds / length:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} seconds"
