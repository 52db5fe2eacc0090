"""Logs of a training that others read: TensorBoard, lines of JSON, Weights & Biases."""

import contextlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from configs.schema import Key, Several
from storage.files import atomic_write, one_line, open_regular
from storage.tensorboard import TensorBoardWriter

log = logging.getLogger(__name__)

KEYS = {
    "training.loggers": Key(
        "tensorboard,jsonl",
        Several(registry="storage.loggers.LOGGERS"),
        "where curves are logged: 'tensorboard' (curves and pictures; reports read it), 'jsonl' "
        "(metrics.jsonl), 'wandb' (Weights & Biases, where it is installed)",
    ),
}


class Logger:
    """A log of numbers and pictures by step. Its methods may raise anything; see `Loggers`."""

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step by their tags."""
        raise NotImplementedError

    def add_image(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """Log a picture (H, W, C); by default none is logged."""

    def flush(self) -> None:
        """Write what was added to disk, if it is not yet."""

    def close(self) -> None:
        """End the log."""


class JsonLines(Logger):
    """metrics.jsonl: a line for each step that logs numbers.

    It has the `step`, the `seconds` of training until then, and the numbers by their tags, None
    where they are not finite. Each line is written at once; a run that is resumed removes lines
    beyond its step, and one that a power cut has torn.
    """

    def __init__(self, workdir: Path, step: int, values: Mapping[str, Any]):
        self.path, self.last = workdir / "metrics.jsonl", {}
        self._keep_until(step)
        self.start = time.monotonic() - self.last.get("seconds", 0.0)

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        numbers = {tag: float(x) if math.isfinite(x) else None for tag, x in values.items()}
        if self.last.get("step") == step:  # what a signal had prevented is logged by the next start
            self.last |= numbers
            self._keep_until(step - 1, _line(self.last))
            return
        seconds = round(time.monotonic() - self.start, 3)
        self.last = {"step": step, "seconds": seconds} | numbers
        with open_regular(self.path, "ab", follow=False) as file:
            file.write(_line(self.last))

    def _keep_until(self, step: int, added: bytes = b"") -> None:
        """Remove lines of later steps and damaged ones, and append the line `added`."""
        try:
            with open_regular(self.path, follow=False) as file:
                lines = file.readlines()
        except FileNotFoundError:
            lines = []
        if lines and not lines[-1].endswith(b"\n"):
            lines[-1] = b"torn"
        entries = {line: entry for line in lines if (entry := _entry(line))["step"] <= step}
        if added or len(entries) < len(lines):
            with atomic_write(self.path) as file:
                file.writelines([*entries, added])
        if entries and not added:
            self.last = [*entries.values()][-1]


def _line(entry: dict[str, Any]) -> bytes:
    return f"{json.dumps(entry)}\n".encode()


def _entry(line: bytes) -> dict[str, Any]:
    """The content of a `line` of JsonLines; a damaged line has an infinite step."""
    with contextlib.suppress(ValueError, RecursionError):
        entry = json.loads(line)
        kinds = {"step": int, "seconds": float}
        if type(entry) is dict and all(type(entry.get(name)) is kinds[name] for name in kinds):
            return entry
    return {"step": math.inf}


class WeightsAndBiases(Logger):
    """A run of Weights & Biases, in whose charts `step` is the axis.

    Its own environment variables name the project (else "pfgm") and keep it offline
    (WANDB_MODE=offline). A run that is resumed goes on with the same run there, which shows steps
    between the checkpoint and the kill twice: points cannot be taken back.
    """

    def __init__(self, workdir: Path, step: int, values: Mapping[str, Any]):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pfgm"),
            id=_id_in(workdir / "wandb/id"),
            name=workdir.resolve().name,
            dir=str(workdir),
            config=dict(values),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("*", step_metric="step")

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def add_image(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        self.run.log({tag: self.wandb.Image(image), "step": step})

    def close(self) -> None:
        self.run.finish()


def _id_in(path: Path) -> str:
    """The id in the file at `path`; where there is no file, it is made with a random id."""
    with contextlib.suppress(FileNotFoundError), open_regular(path, follow=False) as file:
        return file.read(100).decode()
    name = uuid.uuid4().hex[:16]
    with atomic_write(path) as file:
        file.write(name.encode())
    return name


def tensorboard(workdir: Path, step: int, values: Mapping[str, Any]) -> TensorBoardWriter:
    """TensorBoard's files, in the folder tensorboard/."""
    return TensorBoardWriter(workdir / "tensorboard", step)


# Loggers of training.loggers, called with the workdir, the step from which the run goes on, and its
# flat config.
LOGGERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Logger]] = {
    "tensorboard": tensorboard,
    "jsonl": JsonLines,
    "wandb": WeightsAndBiases,
}


class Loggers:
    """The loggers of a run, as a context manager; one that fails is left out and the run goes on.

    Args:
        names: of `LOGGERS`, with commas between them.
        workdir: of the run.
        step: the run goes on from it; what a killed run logged beyond it is dropped.
        values: the flat config of the run.
    """

    def __init__(self, names: str, workdir: Path, step: int, values: Mapping[str, Any]):
        self.loggers: dict[str, Logger] = {}
        for name in filter(None, (name.strip().lower() for name in names.split(","))):
            with self._failing(name):
                self.loggers[name] = LOGGERS[name](workdir, step, values)

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step by their tags; nothing is logged where there are none."""
        if values:
            self._each("add_scalars", values, step)

    def add_image(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """Log a picture (H, W, C)."""
        self._each("add_image", tag, image, step)

    def flush(self) -> None:
        """Write what was added to disk."""
        self._each("flush")

    def _each(self, method: str, *arguments) -> None:
        for name, logger in [*self.loggers.items()]:
            with self._failing(name):
                getattr(logger, method)(*arguments)

    @contextlib.contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a network, a disk, a library
            log.warning(f"the logger {name!r}: {one_line(error)}; it logs nothing more")
            self.loggers.pop(name, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._each("close")
