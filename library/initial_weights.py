"""The weights of another model that a new run starts from, and the record of them in the run."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn

from configs.keys import shown
from configs.schema import EXACT, Text
from models.weights import load_matching
from storage.checkpoints import fit
from storage.digests import digest
from storage.files import about
from storage.run_checkpoints import find_checkpoint

INIT_FROM = "training.init_from"
SCALES = ("model.sigma_data", "model.sigma_unit")  # what a network's inputs are scaled by
MAX_NAMED = 6  # entries of a network that a line names one by one


@dataclass(frozen=True)
class InitialWeights:
    """Record of the weights that a run started from.

    Attributes:
        path: the workdir or file, as `training.init_from` named it.
        step: number of training steps that they had taken.
        digest: SHA-256 of those that were copied, as an evaluation has it of a whole network.
    """

    path: str
    step: int
    digest: str

    @classmethod
    def read(cls, path: Path, checkpoint: dict) -> Self | None:
        """The record in the entry `init_from` of `checkpoint`, from `path`; None without one.

        Raises ValueError where the entry is something else.
        """
        match checkpoint.get("init_from"):
            case None:
                return None
            case {"path": str(name), "step": int(step), "digest": str(sha256)} if (
                Text().accepts(name) and 0 <= step < EXACT and re.fullmatch("[0-9a-f]{64}", sha256)
            ):
                return cls(name, step, sha256)
            case other:
                raise ValueError(f"{path}: its init_from names no weights: {shown(other)}")

    def entry(self) -> dict[str, Any]:
        """The entry of a checkpoint for `read`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"the weights of {self.path}, step {self.step:,}, digest {self.digest[:12]}"


def initialise(
    network: nn.Module, source: str, values: Mapping[str, Any] | None = None
) -> tuple[InitialWeights, str]:
    """Copy the matching EMA weights of the workdir or file `source` into `network`.

    `values`, the flat config of the new run, is compared with that of the file: weights mean
    something else at another scale of the data.

    Returns:
        Their record, and a line on what was copied and what was not.

    Raises:
        OSError: there is no checkpoint, or it cannot be read.
        ValueError: it is damaged, or nothing of it matches.
    """
    with about(f"{INIT_FROM}={source}"):
        path, content = find_checkpoint(Path(source))
        copied = fit(partial(load_matching, network), content, path)
    weights = network.state_dict()
    sha256 = digest({entry: weights[entry] for entry in copied.names})
    record = InitialWeights(source, content["step"], sha256)
    initial = f"; at their initial values: {_listed(copied.initial)}" if copied.initial else ""
    unused = f"; {copied.unused:,} tensors of the file are not used" if copied.unused else ""
    stored = content.get("config")
    stored = stored if type(stored) is dict else {}
    scales = "".join(
        f"; its {key} is {shown(stored[key])}, that of this run {shown(values[key])}"
        for key in SCALES
        if values and key in stored and stored[key] != values[key]
    )
    line = (
        f"initialised from the EMA weights of {path}, step {record.step:,}, digest {sha256[:12]}: "
        f"{len(copied.names):,} of {len(weights):,} tensors copied{initial}{unused}{scales}"
    )
    return record, line


def recall(
    path: Path, checkpoint: dict, values: dict[str, Any]
) -> tuple[InitialWeights | None, list[str]]:
    """Read the record of a run that resumes, and set `training.init_from` in `values` to its path.

    Args:
        path, checkpoint: the state to resume from.
        values: the flat config, which is changed.

    Returns:
        The record, and a line for the log if the config named another file.

    Raises ValueError as `InitialWeights.read`.
    """
    record, name = InitialWeights.read(path, checkpoint), values[INIT_FROM]
    values[INIT_FROM] = record.path if record else ""
    if name in ("", values[INIT_FROM]):
        return record, []
    return record, [f"{INIT_FROM}={name} is not read: the run goes on from {path}"]


def entry_of_report(path: Path, checkpoint: dict) -> dict[str, str]:
    """The entry of a report on the record in `checkpoint`, from `path`; {} without one."""
    record = InitialWeights.read(path, checkpoint)
    return {"initial_weights": str(record)} if record else {}


def _listed(names: Sequence[str]) -> str:
    """The names of entries; of many, their modules, each with the number of its entries."""
    if len(names) <= MAX_NAMED:
        return ", ".join(names)
    modules = Counter(".".join(name.split(".")[:2]) for name in names)
    words = [f"{module} ({number})" for module, number in modules.items()]
    more = f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else ""
    return f"{len(names):,} entries of {', '.join(words[:MAX_NAMED])}{more}"
