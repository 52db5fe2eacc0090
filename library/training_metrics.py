"""Metrics of a few samples during a training, by which its best checkpoint is chosen."""

import contextlib
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from configs.keys import shown
from configs.schema import EXACT, Key, Text, whole
from experiment_parts import Parts
from metrics.distances import TooFew
from metrics.features import get_spaces
from metrics.reference import ReferenceStatistics, Training
from metrics.table import METRICS, Comparison
from processes.watch import did
from reports.progress import progress_bar
from solvers.base import Watch
from sources.digests import joined
from sources.keyed import keyed_generator
from storage.digests import digest

KEYS = {
    "training.metric_freq": Key(
        0,
        whole(0),
        "steps between metrics of a few samples, in the first space of eval.features; the state "
        "with the lowest Frechet distance is kept as checkpoints/best.pth; 0: none",
    ),
    "training.metric_samples": Key(500, whole(4, 10**6), "samples for these metrics"),
}

LOGGED = ("fid", "kid")  # metrics that cost little
HOW = ("batch_size", "precision", "channels_last", "compiles")  # a sampler computes, not what
GROUPS = 10  # of samples, by which the noise of a distance is estimated


@dataclass(frozen=True)
class Best:
    """The checkpoint whose samples have the lowest Frechet distance in a training.

    `fid` is the distance of that many `samples` in the space `features`, at `step`. They were drawn
    by a sampler with the digest `sampler`; "" in records of older programs.
    """

    step: int
    fid: float
    samples: int
    features: str
    sampler: str = ""

    @classmethod
    def read(cls, path: Path, checkpoint: dict) -> Self | None:
        """The record in a `checkpoint`, from `path`; None in those that are not the best.

        Raises:
            ValueError: it holds something else in its place.
        """
        match checkpoint.get("best"):
            case None:
                return None
            case {"fid": float(fid), "samples": int(samples), "features": str(features)} if (
                0 <= fid < EXACT and 0 <= samples < EXACT and Text().accepts(features)
            ):
                sampler = str(checkpoint["best"].get("sampler", ""))
                return cls(checkpoint["step"], fid, samples, features, sampler)
            case other:
                raise ValueError(f"{path}: its entry `best` is malformed: {shown(other)}")

    def entry(self) -> dict[str, Any]:
        """The entry of the checkpoint, which `read` reads."""
        return {name: value for name, value in asdict(self).items() if name != "step"}

    def __str__(self) -> str:
        return (
            f"lowest Fréchet distance along the training, {self.fid:.4g} of {self.samples:,} "
            f"samples ({self.features}); they are not those of this evaluation"
        )


def entry_of_report(path: Path, checkpoint: dict) -> dict[str, str]:
    """The entry of a report on the choice of `checkpoint`, from `path`; {} if it was not chosen."""
    best = Best.read(path, checkpoint)
    return {"best": str(best)} if best else {}


@dataclass
class FewSamples:
    """A few samples, from the same prior draws every time, in the first feature space of a run.

    An evaluation has other draws, so that a checkpoint is not judged by those that it was chosen
    by.
    """

    experiment: Parts
    statistics: ReferenceStatistics
    number: int
    batch_size: int
    seed: int

    @classmethod
    def from_config(cls, config, experiment: Parts) -> Self | None:
        """The samples of a config; None where `training.metric_freq` is 0.

        All processes have to call this.
        """
        if not config.training.metric_freq:
            return None
        options = config.eval
        spaces = get_spaces(
            options.features, options.inception_path, experiment.codec, experiment.device
        )
        statistics = ReferenceStatistics.build(
            spaces[0], Path(options.stats_dir), Training(experiment.data)
        )
        number = config.training.metric_samples
        return cls(experiment, statistics, number, options.batch_size, config.seed)

    def compare(self, watch: Watch) -> Comparison | None:
        """Draw samples of the network as it is, for a comparison; None where none is finite.

        Raises FloatingPointError where the solver diverges, and what `watch` raises.
        """
        experiment, statistics = self.experiment, self.statistics
        if statistics.reference is None:
            with progress_bar(total=len(statistics.data), desc="data", unit="image") as progress:

                def show(number: int) -> None:
                    progress.update(number)
                    did("features of the data")

                statistics.measure(show)
        statistics.data = None  # a second copy of the images
        features, logits = [], []
        for r, first in enumerate(range(0, self.number, self.batch_size)):
            number = min(self.batch_size, self.number - first)
            samples, _ = experiment.sampler(
                experiment.network,
                number,
                generator=keyed_generator(experiment.device, "metrics", self.seed, r),
                conditions=experiment.draw_conditions(number, "metrics", r),
                watch=watch,
            )
            samples = samples[samples.flatten(1).isfinite().all(1)]
            if len(samples):
                of_round = statistics.space(experiment.codec.stored(samples))
                features.append(of_round[0])
                logits.append(of_round[1])
        if not features:
            return None
        return Comparison(
            np.concatenate(features),
            None if logits[0] is None else np.concatenate(logits),
            statistics.reference,
            statistics.space.backend,
            experiment.device if experiment.device.type == "cuda" else torch.device("cpu"),
        )

    def best(self, step: int, fid: float) -> Best:
        """The record of a distance of these samples."""
        return Best(step, fid, self.number, self.statistics.space.name, self.sampler)

    def are_comparable(self, best: Best) -> bool:
        """Whether the distance of `best` is one of as many samples of this sampler in this space.

        Older programs did not record the sampler; theirs counts as this one.
        """
        return replace(best, sampler=best.sampler or self.sampler) == self.best(best.step, best.fid)

    @cached_property
    def sampler(self) -> str:
        """Digest of what decides which samples a network gives, besides its weights."""
        sampler = self.experiment.sampler
        settings = {key: value for key, value in sampler.settings.items() if key not in HOW}
        guide = sampler.guidance and sampler.guidance.guide
        weights = "" if guide is None else digest(guide.state_dict())
        return joined(repr(sampler.method), repr(settings), weights)[:32]


def metrics_of(comparison: Comparison) -> dict[str, float]:
    """The metrics `LOGGED` as far as they can be computed, by their keys."""
    values = {}
    for key in LOGGED:
        with contextlib.suppress(TooFew):
            if (value := METRICS[key].compute(comparison)) is not None:
                values[key] = float(value)
    return values


def noise_of(comparison: Comparison) -> float:
    """Standard deviation of the Frechet distance over draws of as many samples.

    It is that of the jackknife, which leaves out each of `GROUPS` groups in turn (Efron 1982,
    chapter 3). A bootstrap would draw samples twice, which widens a distance of few samples. It is
    infinite for two samples.
    """
    number = min(GROUPS, len(comparison.features))
    if number < 3:
        return math.inf
    groups = np.random.default_rng(0).permutation(len(comparison.features)) % number
    distances = [
        METRICS["fid"].compute(replace(comparison, features=comparison.features[groups != group]))
        for group in range(number)
    ]
    return math.sqrt(number - 1) * float(np.std(distances))
