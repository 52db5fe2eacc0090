"""The weights of another model that a new run begins with, and the record of them that it keeps."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn

from configs.keys import shown
from configs.schema import EXACT, Text
from models.weights import load_fitting
from storage.checkpoints import fit
from storage.digests import digest
from storage.files import about
from storage.run_checkpoints import find_checkpoint

INIT_FROM = "training.init_from"
MAX_NAMED = 6  # entries of a network that a line names one by one


@dataclass(frozen=True)
class InitialWeights:
    """The record of the weights that a run began with.

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


def begin(network: nn.Module, name: str) -> tuple[InitialWeights, str]:
    """Copy the EMA weights that fit `network` from the workdir or file that `name` is.

    Returns:
        Their record, and a line on what was copied and what was not.

    Raises:
        OSError: there is no checkpoint, or it cannot be read.
        ValueError: it is damaged, or nothing of it fits.
    """
    with about(f"{INIT_FROM}={name}"):
        path, content = find_checkpoint(Path(name))
        copied = fit(partial(load_fitting, network), content, path)
    weights = network.state_dict()
    sha256 = digest({entry: weights[entry] for entry in copied.names})
    record = InitialWeights(name, content["step"], sha256)
    initial = f"; initial values: {_listed(copied.initial)}" if copied.initial else ""
    placeless = f"; of the file {copied.placeless:,} have no place" if copied.placeless else ""
    line = (
        f"begins with the EMA weights of {path}, step {record.step:,}, digest {sha256[:12]}: "
        f"{len(copied.names):,} of {len(weights):,} entries copied{initial}{placeless}"
    )
    return record, line


def recall(
    path: Path, checkpoint: dict, values: dict[str, Any]
) -> tuple[InitialWeights | None, list[str]]:
    """The record of a run that resumes from `checkpoint`, from `path`, and lines for the log.

    It takes the place of `training.init_from` in the flat config `values`; a line says where that
    was another. Raises ValueError as `InitialWeights.read`.
    """
    record, name = InitialWeights.read(path, checkpoint), values[INIT_FROM]
    values[INIT_FROM] = record.path if record else ""
    if name in ("", values[INIT_FROM]):
        return record, []
    return record, [f"{INIT_FROM}={name} is not read: the run goes on from {path}"]


def began_with(path: Path, checkpoint: dict) -> dict[str, str]:
    """The entry of a report on the record in `checkpoint`, from `path`; {} without one."""
    record = InitialWeights.read(path, checkpoint)
    return {"began_with": str(record)} if record else {}


def _listed(names: Sequence[str]) -> str:
    """The names of entries; of many, their modules, each with the number of its entries."""
    if len(names) <= MAX_NAMED:
        return ", ".join(names)
    modules = Counter(".".join(name.split(".")[:2]) for name in names)
    words = [f"{module} ({number})" for module, number in modules.items()]
    more = f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else ""
    return f"{len(names):,} entries of {', '.join(words[:MAX_NAMED])}{more}"
