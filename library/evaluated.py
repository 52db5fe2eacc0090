"""A checkpoint that is evaluated, and the split of the data that it is evaluated on."""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from datasets import Data, DataSet
from experiment_parts import Parts
from metrics.reference import origin_of
from reports.evaluation_page import PICTURES
from sources.digests import of_source
from sources.keyed import keyed_generator
from storage.files import read_arrays


@dataclass(frozen=True)
class Split:
    """A split of the data, on which losses and likelihoods are computed.

    `remark` says what is amiss with them, such as class labels that it does not have.
    """

    name: str
    data: DataSet
    remark: str = ""

    @classmethod
    def from_config(cls, config, data: Data) -> Self:
        """The split `eval.dataset`; ValueError where it lacks class labels that are needed."""
        name = config.eval.dataset
        if config.eval.enable_pairs and not data.has_pairs:
            raise ValueError("eval.enable_pairs needs pairs: data.condition_path names none")
        if config.eval.enable_classification and not data.has_labels(name):
            raise ValueError(
                f"eval.enable_classification needs class labels, and the {name} split has none: "
                "eval.dataset='train' may have them"
            )
        return cls(name, data.get(name), data.remark(name))

    @functools.cached_property
    def origin(self) -> dict[str, str]:
        """Digests, which say what results were computed from."""
        beside = getattr(self.data, "read_beside", {})
        return origin_of(self.data) | {name: of_source(rows) for name, rows in beside.items()}

    def remark_on(self, key: str) -> dict[str, str]:
        """The report's entry that remarks on its number `key`, if there is anything to say."""
        return {f"{key}_remark": self.remark} if self.remark else {}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The weights of one checkpoint, and where their results go.

    Attributes:
        experiment: whose network has the weights.
        folder, k: of the results, and the checkpoint's number in their names.
        step: of training, that the weights are of.
        origin: everything that the results of these weights depend on; see `Experiment.origin`.
        seed: of everything random.
        batch_size: images at once.
        repeat: number of the set of samples, from 0, of the `eval.repeats` sets.
    """

    experiment: Parts
    folder: Path
    k: int
    step: int = 0
    origin: Mapping[str, Any]
    seed: int
    batch_size: int
    repeat: int = 0

    def generator(self, purpose: str, *key: int) -> torch.Generator:
        """A generator on the device; see `keyed_generator`."""
        return keyed_generator(self.experiment.device, purpose, self.seed, *key)

    @property
    def samples_folder(self) -> Path:
        """The folder of the cached rounds of samples; further sets have folders below it."""
        folder = self.folder / f"ckpt_{self.k}"
        return folder / f"repeat_{self.repeat}" if self.repeat else folder

    @property
    def of_set(self) -> tuple[int, ...]:
        """The part of a generator's key that sets the draws of further sets apart."""
        return (self.repeat,) if self.repeat else ()

    def picture(self, name: str) -> Path:
        """The path of a picture."""
        return self.folder / f"{name}_{self.k}.png"

    def remove_results(self, of_best: bool) -> None:
        """Remove the report and the pictures, which are to be made anew.

        Raises ValueError where the report is of another step, and one of the two is of the best
        checkpoint (`of_best`: this one is): their steps may share a number, and both count.
        """
        report_path, report = self.folder / f"report_{self.k}.npz", {}
        with contextlib.suppress(OSError, ValueError):  # missing or damaged
            report = read_arrays(report_path, ("step", "best"))
        if report and report["step"] != self.step and of_best != ("best" in report):
            raise ValueError(
                f"{report_path} is of step {report['step']}, and step {self.step} has the same "
                "number (training.snapshot_freq): evaluate it in a folder of its own, "
                "--eval_folder=best"
            )
        for path in (report_path, *map(self.picture, PICTURES)):
            path.unlink(missing_ok=True)
