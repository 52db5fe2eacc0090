"""Checkpoints: files of a state that are written, checked and read."""

import errno
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch

from configs.keys import flatten
from storage.checks import check_like
from storage.edm_configs import complete_config
from storage.edm_snapshots import objective_weights, read_snapshot
from storage.files import about, atomic_write, naming, open_regular, refusing
from storage.shared_files import SHARED, open_shared
from storage.stored_tensors import StoredTensor
from storage.torch_files import read_state

T = TypeVar("T")

CHECKPOINT_KEYS = ("model", "ema", "optimizer", "step")
SNAPSHOTS = (".pkl", ".pt", SHARED)  # EMA weights alone: of EDM, EDM2 and PFGM++; shared files


def save_checkpoint(path: Path, state: dict, previous: Path | None = None) -> None:
    """Write `state`, a dictionary of tensors, numbers, lists and dictionaries, to `path`.

    The file is read back and checked before it replaces an earlier one, which is kept as
    `previous`. Raises OSError as `atomic_write` does, and where the check fails.
    """
    with atomic_write(path, previous) as file:
        try:
            torch.save(state, file)
            file.flush()
            _check_records(file)
        except RuntimeError as error:  # torch's writer hides what went wrong with the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        except (ValueError, zipfile.BadZipFile) as error:
            raise OSError(errno.EIO, f"what was written reads back otherwise: {error}") from error


def _check_records(file: BinaryIO) -> None:
    """Raise ValueError (BadZipFile from some damage) where a record is not what was written.

    A file of `torch.save` is a zip file with a CRC-32 of every record. Reading at 4 GB/s, the check
    costs a fraction of the writing.
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of the record {damaged} differs")


def load_checkpoint(path: Path) -> dict:
    """The dictionary saved at `path`, its tensors on the CPU; see `read_state`.

    Of a snapshot of EDM or PFGM++ (.pkl, .pt) it has the EMA weights by their published names as
    `model`, the `config`, and the number in the file's name as `step`; of a file of
    `save_shared` the same, and the step of the training.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is damaged, or not a checkpoint of this program.
    """
    if path.suffix in SNAPSHOTS:
        content = open_checkpoint(path, intact=True)
        weights = content["model"]
        for name, weight in weights.items():
            weights[name] = weight.load() if isinstance(weight, StoredTensor) else weight
        return content
    with refusing(path, "is not a checkpoint"), open_regular(path) as file:
        state, _ = read_state(file)
    return _checked(path, state)


def open_checkpoint(path: Path, intact: bool = False) -> dict:
    """The dictionary of `load_checkpoint` with a `StoredTensor` in place of each tensor.

    The file stays open while these are referenced, even if another file takes its name. Tensors of
    EDM and PFGM++ snapshots are read at once.

    Args:
        path: of the checkpoint.
        intact: read the whole file, piece by piece, to detect damage; else damage shows when a
            tensor is loaded.

    Raises as `load_checkpoint`.
    """
    if path.suffix == SHARED:
        return open_shared(path, intact)
    if path.suffix in SNAPSHOTS:
        return _load_snapshot(path)
    with refusing(path, "is not a checkpoint"):
        state, storages = read_state(open_regular(path), stored=True)
        for storage in storages if intact else ():
            storage.check()
    return _checked(path, state)


def _checked(path: Path, state: object) -> dict:
    """The `state` from `path`; ValueError where it lacks an entry that every checkpoint has."""
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(state, dict) or k not in state]
    with about(f"{path} is not a training checkpoint"):
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        check_like(state["step"], 0, "step")
    return state


def _load_snapshot(path: Path) -> dict:
    snapshot = read_snapshot(path)
    with about(path):
        config = flatten(complete_config(snapshot))
    return {
        "model": snapshot.weights,
        "step": snapshot_number(path),
        "config": config,
        "objective": objective_weights(snapshot),
    }


def snapshot_number(path: Path) -> int:
    """k of network-snapshot-{k}.pkl and training-state-{k}.pt, else 0.

    In EDM2's names the relative width of the EMA follows: network-snapshot-{k}-0.100.pkl.
    """
    name = r"(?:network-snapshot|training-state)-([0-9]{1,15})(?:-0\.[0-9]{1,9})?"
    match = re.fullmatch(name, path.stem)
    return int(match[1]) if match else 0


def fit(load: Callable[[dict], T], state: dict, path: Path, changes: Sequence[str] = ()) -> T:
    """`load(state)`, the content of `path`; where it does not fit, a ValueError says why.

    Args:
        load: a function of the state that raises ValueError where it does not fit.
        state, path: content and path of a checkpoint.
        changes: where the config differs from the run's, which the message names too.
    """
    try:
        with naming(path):
            return load(state)
    except ValueError as error:
        reason = " ".join(str(error).split())
        since = f"; the run's own config differs: {', '.join(changes)}"
        raise ValueError(
            f"{path} does not fit the configured network: {reason:.300}{since if changes else ''}"
        ) from error
