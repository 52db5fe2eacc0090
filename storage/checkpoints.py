"""Checkpoints: written, checked and read; which to go on from, which to evaluate."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from configs.keys import flatten, shown
from storage import safetensors
from storage.checks import check_like
from storage.digests import digest
from storage.edm_snapshots import complete_config, read_snapshot
from storage.files import atomic_write, naming, one_line
from storage.stored_tensors import StoredTensor
from storage.torch_files import open_state, read_state
from storage.workdir import checkpoint_path, resume_paths

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECKPOINT_KEYS = ("model", "ema", "optimizer", "step")
SHARED = ".safetensors"  # what `--mode export` writes
SNAPSHOTS = (".pkl", ".pt", SHARED)  # EMA weights alone: of EDM and PFGM++, and our own


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
        weights = content["model"].items()
        return content | {
            "model": {name: w.load() if isinstance(w, StoredTensor) else w for name, w in weights}
        }
    with _reading(path), open(path, "rb") as file:
        state = read_state(file)
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
        return _open_shared(path, intact)
    if path.suffix in SNAPSHOTS:
        return _load_snapshot(path)
    with _reading(path):
        state, check = _opened(path, open_state)
        if intact:
            check()
    return _checked(path, state)


def _opened(path: Path, read: Callable[[BinaryIO], T]) -> T:
    """`read(file)` of the file at `path`, which is closed only if that fails."""
    file = open(path, "rb")  # noqa: SIM115
    try:
        return read(file)
    except BaseException:
        file.close()
        raise


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within the `with` block, turn any error of a damaged file into a ValueError with `path`."""
    try:
        with naming(path):
            yield
    except Exception as error:  # a damaged file makes zipfile fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to nowhere
            raise
        raise ValueError(f"{path} is not a checkpoint: {one_line(error)}") from error


def _checked(path: Path, state: object) -> dict:
    """The `state` from `path`; ValueError where it lacks an entry that every checkpoint has."""
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(state, dict) or k not in state]
    if missing:
        raise ValueError(f"{path} is not a training checkpoint: it has no {', '.join(missing)}")
    try:
        check_like(state["step"], 0, "step")
    except ValueError as error:
        raise ValueError(f"{path} is not a training checkpoint: {error}") from error
    return state


def _load_snapshot(path: Path) -> dict:
    snapshot = read_snapshot(path)
    try:
        config = flatten(complete_config(snapshot))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return {"model": snapshot.weights, "step": _snapshot_number(path), "config": config}


def save_shared(
    path: Path, weights: dict[str, Tensor], values: dict, step: int, data: dict | None = None
) -> None:
    """Write EMA `weights` by name, a flat config and the `step` as one file in safetensors form.

    `data` is the entry `data` of checkpoints. Raises OSError, which names the path, where the file
    cannot be written.
    """
    metadata = {
        "format": "pt",
        "config": json.dumps(values),
        "step": str(step),
        "data_range": "[-1, 1]" if values["data.centered"] else "[0, 1]",
    }
    if data is not None:
        metadata["data"] = json.dumps(data)
    metadata["checksum"] = _checksum(weights, metadata)
    with atomic_write(path) as file:
        safetensors.write(file, weights, metadata)


def _checksum(weights: dict[str, Tensor | StoredTensor], metadata: dict[str, str]) -> str:
    """SHA-256 of all that a shared file says: damage is found, an author's lie is not."""
    words = [digest(dict(sorted(weights.items()))), *map("=".join, sorted(metadata.items()))]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _open_shared(path: Path, intact: bool) -> dict:
    try:
        with naming(path):
            weights, metadata = _opened(path, safetensors.open_tensors)
        step, checksum = metadata.get("step", ""), metadata.pop("checksum", None)
        if not re.fullmatch(r"[0-9]{1,15}", step) or "config" not in metadata:
            raise ValueError("its metadata lack the config or the step that --mode export writes")
        if intact and checksum != _checksum(weights, metadata):
            raise ValueError("it is damaged: its content differs from its checksum")
        config, data = json.loads(metadata["config"]), json.loads(metadata.get("data", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a shared model: {one_line(error)}") from error
    return {"model": weights, "step": int(step), "config": config, "data": data}


def written_steps(checkpoint: dict, path: Path) -> list[int]:
    """The steps of the numbered checkpoints that the run of `checkpoint`, from `path`, has written.

    Raises:
        ValueError: the checkpoint holds something else.
    """
    steps = checkpoint.get("written", [])
    last = checkpoint["step"]
    if type(steps) is not list or not all(type(s) is int and 0 <= s <= last for s in steps):
        raise ValueError(f"{path}: `written` holds no steps up to {last}: {shown(steps)}")
    return steps


def _check_records(file: BinaryIO) -> None:
    """Raise ValueError (BadZipFile from some damage) where a record is not what was written.

    What `torch.save` writes is a zip file with a CRC-32 of every record. Reading at 4 GB/s, the
    check costs a fraction of the writing.
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of the record {damaged} differs")


# --- of a run ------------------------------------------------------------------------------------


def save_to_resume(workdir: Path, state: dict) -> None:
    """Save the newest state and keeps the one before; OSError where it cannot be written."""
    newest, previous = resume_paths(workdir)
    save_checkpoint(newest, state, previous)


def find_checkpoint(path: Path) -> tuple[Path, dict]:
    """Path and content of the checkpoint at `path`, a file or a workdir; see `open_checkpoint`.

    In a workdir it is the newest intact one, else the last of the `snapshots`; no file is changed.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged, or not a checkpoint of this program.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint and no workdir: {path} does not exist")
        return path, open_checkpoint(path, intact=True)
    read = partial(open_checkpoint, intact=True)
    if newest := newest_checkpoint(path, set_aside=False, read=read):
        return newest
    if published := list(snapshots(path).values()):
        return published[-1], open_checkpoint(published[-1], intact=True)
    raise FileNotFoundError(f"no checkpoint in {path}: neither checkpoints-meta/ nor checkpoints/")


def newest_checkpoint(
    workdir: Path, set_aside: bool = True, read: Callable[[Path], dict] = load_checkpoint
) -> tuple[Path, dict] | None:
    """Path and content of the newest state that `read` accepts; None where there is none at all.

    A warning names a damaged file, and the one before it is tried; the numbered ones come last. A
    damaged newest state is `set_aside`, so that it does not replace the one before it.

    Raises:
        ValueError: there are states, but all of them are damaged.
    """
    newest, *others = [*resume_paths(workdir), *reversed(numbered_checkpoints(workdir).values())]
    damaged = []
    for path in (newest, *others):
        try:
            state = read(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            log.warning(f"{error}; looking for the checkpoint before it")
            damaged.append(path)
            continue
        if set_aside and newest in damaged:
            with contextlib.suppress(FileNotFoundError):  # another process of the run has done it
                os.replace(newest, newest.with_name(f"{newest.name}.damaged"))
        return path, state
    if damaged:
        raise ValueError(
            f"no intact checkpoint to go on from: {', '.join(map(str, damaged))} damaged; "
            "name another workdir to start anew"
        )
    return None


def peek(workdir: Path) -> tuple[Path, dict] | None:
    """Path and content of the newest checkpoint that can be read, without the tensors' memory.

    None where there is none. Damaged ones are skipped without a warning, which loading gives.
    """
    numbered = [*reversed(numbered_checkpoints(workdir).values())]
    for path in (*resume_paths(workdir), *numbered):
        try:
            return path, open_checkpoint(path)
        except (OSError, ValueError):
            continue
    shared = [path for path in snapshots(workdir).values() if path.suffix == SHARED]
    return (shared[-1], open_checkpoint(shared[-1])) if shared and not numbered else None


def drop_checkpoints(workdir: Path, written: list[int], keep: int) -> list[int]:
    """Deletes the oldest of the run's own numbered checkpoints, to leave `keep` (0: all).

    Args:
        written: their steps, in the order of writing; files of other steps are not touched.

    Returns:
        The steps that are left.
    """
    dropped = written[:-keep] if keep else []
    for step in dropped:
        path = checkpoint_path(workdir, step)
        for each in (path, *path.parent.glob(f"{path.stem}.fitted*.npz")):
            each.unlink(missing_ok=True)
    return written[len(dropped) :]


def fitted_path(checkpoint: Path, n: int = 0) -> Path:
    """The file beside the `checkpoint` of measured errors or, for `n` > 0, of n fitted steps."""
    return checkpoint.with_suffix(f".fitted-{n}.npz" if n else ".fitted.npz")


def numbered_checkpoints(workdir: Path) -> dict[int, Path]:
    """{step: path} of the numbered checkpoints, in ascending order."""
    names = re.compile(r"checkpoint_(\d+)\.pth")
    paths = (workdir / "checkpoints").glob("checkpoint_*.pth")
    return dict(sorted((int(m[1]), p) for p in paths if (m := names.fullmatch(p.name))))


def snapshots(workdir: Path) -> dict[int, Path]:
    """{k: path} of the snapshots of EDM and PFGM++ in checkpoints/, in ascending order.

    Number k is that of network-snapshot-{k}.pkl or training-state-{k}.pt, which counts thousands of
    images; 0 for other names.

    Raises:
        ValueError: two have the same number.
    """
    found: dict[int, Path] = {}
    for path in sorted((workdir / "checkpoints").glob("*")):
        if path.suffix in SNAPSHOTS:
            other = found.setdefault(_snapshot_number(path), path)
            if other != path:
                raise ValueError(
                    f"{other} and {path.name} are both number {_snapshot_number(path)}: leave one, "
                    "or number them as in network-snapshot-1.pkl"
                )
    return dict(sorted(found.items()))


def _snapshot_number(path: Path) -> int:
    match = re.fullmatch(r"(?:network-snapshot|training-state)-([0-9]{1,15})", path.stem)
    return int(match[1]) if match else 0


def checkpoints_to_evaluate(
    workdir: Path, first: int, end: int, freq: int, n_iters: int
) -> dict[int, Path]:
    """{k: path} of the checkpoints number `first` to `end` that exist.

    Number k is that of step k * `freq`, and the last number of a run is that of step `n_iters`,
    even if `freq` does not divide it. Some published programs name files by k itself; such a file
    is used where its step agrees. A number beyond the last one whose file does not exist means the
    last one. A workdir that has `snapshots` only gives all of them.

    Raises:
        FileNotFoundError: none of them exists.
        ValueError: the first number is larger than the last, or two snapshots have the same.
    """
    if first > end:
        raise ValueError(f"eval.begin_ckpt={first} lies after eval.end_ckpt={end}")
    published = snapshots(workdir)
    if published and not numbered_checkpoints(workdir):
        return published
    last = math.ceil(n_iters / freq)

    def step_of(k: int) -> int:
        return n_iters if k == last else k * freq

    def find(k: int) -> Path | None:
        path, by_number = checkpoint_path(workdir, step_of(k)), checkpoint_path(workdir, k)
        if path.exists():
            return path
        if not by_number.exists():
            return None
        step = open_checkpoint(by_number)["step"]
        return by_number if step == step_of(k) or step // freq == k else None

    paths = {k: find(k) for k in range(first, end + 1)}
    if beyond := [k for k in paths if k > last and paths[k] is None]:
        log.info(
            f"eval.begin_ckpt={first} to eval.end_ckpt={end}: the last checkpoint of "
            f"training.n_iters={n_iters} steps is number {last}"
        )
        within = {k: path for k, path in paths.items() if k not in beyond}
        paths = dict(sorted(({last: find(last)} | within).items()))
    missing = [k for k, path in paths.items() if path is None]
    paths = {k: path for k, path in paths.items() if path is not None}
    folder = workdir / "checkpoints"
    others = [*folder.glob("checkpoint_*.pth"), *published.values()]
    others = sorted(p.name for p in others if p not in paths.values())
    if not paths:
        first, end = min(first, last), min(end, last)
        raise FileNotFoundError(
            f"no checkpoint to evaluate: looked in {folder} for checkpoint_{step_of(first)}.pth to "
            f"checkpoint_{step_of(end)}.pth (eval.begin_ckpt and eval.end_ckpt count "
            f"training.snapshot_freq={freq} steps); found {', '.join(others) or 'none'}"
        )
    for k in missing:
        log.warning(f"{checkpoint_path(workdir, step_of(k))} does not exist; passed over")
    if others:
        log.info(f"not asked for in {folder}: {', '.join(others)}")
    return paths


def fit(load: Callable[[dict], T], state: dict, path: Path, changes: list[str] = ()) -> T:
    """`load(state)`, the content of `path`; where it does not fit, a ValueError says why.

    Args:
        changes: what the config changes of the run's own, to be named then.
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
