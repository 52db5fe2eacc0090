"""Files that are either complete or absent: atomic writing, and checkpoints that are checked."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

CHECKPOINT_KEYS = ("model", "ema", "optimizer", "step")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the `with` block ends without an error.

    It is written beside `path`, flushed to disk and renamed, so that `path` never holds a part;
    what a kill leaves beside it is overwritten by the next write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state`, a dictionary of tensors, numbers, lists and dictionaries, to `path`."""
    with atomic_write(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict:
    """The dictionary saved at `path`, its tensors on the CPU; no code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of this program.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the unpickler fail in any way
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint: {reason}") from error
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(state, dict) or k not in state]
    if missing:
        raise ValueError(f"{path} is not a training checkpoint: it has no {', '.join(missing)}")
    return state
