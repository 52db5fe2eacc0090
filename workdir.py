"""The workdir of a run: what its files are called, who may write to it, and what is left of it.

.checkpoints.lock                     held by the process that trains
config.json                           the config of the first start
stdout.txt                            what was logged, over all starts
tensorboard/                          curves and pictures
checkpoints/checkpoint_{step}.pth     numbered states, to evaluate
checkpoints-meta/checkpoint.pth       the newest state, to go on from
checkpoints-meta/checkpoint.prev.pth  the one before, where the newest is damaged
samples/iter_{step}/                  pictures along the way
.{eval_folder}.lock, {eval_folder}/   the same for an evaluation
"""

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm.contrib.logging import logging_redirect_tqdm

from sources import tfrecords
from checkpoints import atomic_write, load_checkpoint, naming, save_checkpoint

log = logging.getLogger(__name__)

FLUSH_SECONDS = 10  # what TensorBoard shows is at most so old


# --- one writer at a time, and its log ------------------------------------------------------------


@contextlib.contextmanager
def open_workdir(workdir: Path, folder: Path, main: bool = True) -> Iterator[None]:
    """Makes the workdir; within the block `folder`, in it, is this process's alone to write to.

    Of several processes of one run only the `main` one writes; for the others nothing is done.

    What is logged meanwhile is appended to stdout.txt. Training and an evaluation name different
    folders, so one does not keep the other out.

    Raises:
        OSError: the workdir cannot be written, or another process writes to `folder`.
    """
    if not main:
        yield
        return
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir {workdir} is a file; name a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    with _lock(folder), _log_file(workdir / "stdout.txt"), logging_redirect_tqdm():
        yield


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds `.{name}.lock` beside `folder`, which names the process that does.

    The lock is the kernel's, so it ends with the process, however that ends, and is not inherited
    by workers. Over NFS it holds between machines.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            raise BlockingIOError(
                f"{folder} is being written by {holder}; wait for its end, or name another folder"
            ) from None
        except OSError as error:
            log.warning(
                f"{path} cannot be locked ({error.strerror}); see to it that no other process "
                f"writes to {folder}"
            )
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


class _LogFile(logging.FileHandler):
    """A log whose file may fail: the console hears of it once, and the run goes on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            log.warning(f"{self.baseFilename}: {sys.exc_info()[1]}; lines may be missing there")


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    handler = _LogFile(path, mode="a")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except Exception as error:  # the console hears of it from main.py
        handler.handle(
            logging.makeLogRecord({"msg": f"stopped by {type(error).__name__}: {error}"})
        )
        raise
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):  # a full disk, of which `handleError` has told
            handler.close()


# --- the config of the first start ----------------------------------------------------------------


def store_config(workdir: Path, config) -> None:
    """Stores `config` as config.json, {"training.n_iters": 2000, ...}."""
    with atomic_write(workdir / "config.json") as file:
        file.write(json.dumps(_flat(config), indent=1, default=str).encode())


def differences(workdir: Path, config) -> list[str]:
    """What `config` changes of the stored one, as "key: old -> new" each."""
    path = workdir / "config.json"
    new = json.loads(json.dumps(_flat(config), default=str))
    try:
        old = json.loads(path.read_bytes())
        keys = sorted(old.keys() | new.keys())
    except (FileNotFoundError, ValueError, AttributeError, RecursionError) as error:
        log.warning(f"the config is not compared with that of the first start, {path}: {error}")
        return []
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k)]


def _flat(config, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        inner = hasattr(value, "items")
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_path(workdir: Path, step: int) -> Path:
    """The numbered state of `step`."""
    return workdir / "checkpoints" / f"checkpoint_{step}.pth"


def resume_paths(workdir: Path) -> tuple[Path, Path]:
    """The newest state, and the one before it."""
    folder = workdir / "checkpoints-meta"
    return folder / "checkpoint.pth", folder / "checkpoint.prev.pth"


def save_to_resume(workdir: Path, state: dict) -> None:
    """Saves the newest state and keeps the one before; OSError where it cannot be written."""
    newest, previous = resume_paths(workdir)
    save_checkpoint(newest, state, previous)


def newest_checkpoint(workdir: Path) -> tuple[Path, dict] | None:
    """Path and content of the newest state that is intact; None where there is none at all.

    A damaged file is named in a warning, and the one before it is taken; at last the numbered
    ones. A damaged newest state is set aside, so that it does not become the one before.

    Raises:
        ValueError: there are states, but all of them are damaged.
    """
    newest, *others = [*resume_paths(workdir), *reversed(_numbered(workdir).values())]
    damaged = []
    for path in (newest, *others):
        try:
            state = load_checkpoint(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            log.warning(f"{error}; looking for the checkpoint before it")
            damaged.append(path)
            continue
        if newest in damaged:
            with contextlib.suppress(FileNotFoundError):  # another process of the run has done it
                os.replace(newest, newest.with_name(f"{newest.name}.damaged"))
        return path, state
    if damaged:
        raise ValueError(
            f"no intact checkpoint to go on from: {', '.join(map(str, damaged))} damaged; "
            "name another workdir to start anew"
        )
    return None


def drop_checkpoints(workdir: Path, written: list[int], keep: int) -> list[int]:
    """Deletes the oldest of the run's own numbered checkpoints, to leave `keep` (0: all).

    Args:
        written: their steps, in the order of writing; files of other steps are not touched.

    Returns:
        The steps that are left.
    """
    dropped = written[:-keep] if keep else []
    for step in dropped:
        checkpoint_path(workdir, step).unlink(missing_ok=True)
    return written[len(dropped) :]


def _numbered(workdir: Path) -> dict[int, Path]:
    """{step: path} of the numbered checkpoints, in ascending order."""
    names = re.compile(r"checkpoint_(\d+)\.pth")
    paths = (workdir / "checkpoints").glob("checkpoint_*.pth")
    return dict(sorted((int(m[1]), p) for p in paths if (m := names.fullmatch(p.name))))


def checkpoints_to_evaluate(config, workdir: Path) -> dict[int, Path]:
    """{k: path} of those that exist; FileNotFoundError where none does.

    Number k is that of step k * snapshot_freq. Some published programs name files by k itself; such
    a file is taken where the step it holds agrees.
    """
    first, last, freq = config.eval.begin_ckpt, config.eval.end_ckpt, config.training.snapshot_freq
    if first > last:
        raise ValueError(f"eval.begin_ckpt={first} lies after eval.end_ckpt={last}")
    found, missing = {}, []
    for k in range(first, last + 1):
        path, by_number = checkpoint_path(workdir, k * freq), checkpoint_path(workdir, k)
        if path.exists():
            found[k] = path
        elif by_number.exists() and load_checkpoint(by_number)["step"] // freq == k:
            found[k] = by_number
        else:
            missing.append(path)
    folder = workdir / "checkpoints"
    others = sorted(p.name for p in folder.glob("checkpoint_*.pth") if p not in found.values())
    if not found:
        raise FileNotFoundError(
            f"no checkpoint to evaluate: looked in {folder} for checkpoint_{first * freq}.pth to "
            f"checkpoint_{last * freq}.pth (eval.begin_ckpt and eval.end_ckpt count "
            f"training.snapshot_freq={freq} steps); found {', '.join(others) or 'none'}"
        )
    for path in missing:
        log.warning(f"{path} does not exist; passed over")
    if others:
        log.info(f"not asked for in {folder}: {', '.join(others)}")
    return found


def fit(load: Callable[[dict], None], state: dict, path: Path, changes: list[str] = ()) -> None:
    """`load(state)`, the content of `path`; where it does not fit, a ValueError says why.

    Args:
        changes: what the config changed since the run's first start, to be named then.
    """
    try:
        load(state)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        since = f"; config.json of the run's first start differs: {', '.join(changes)}"
        raise ValueError(
            f"{path} does not fit the configured network: {reason:.300}{since if changes else ''}"
        ) from error


# --- arrays, pictures, curves ---------------------------------------------------------------------


def save_npz(path: Path, **arrays) -> None:
    """Writes `arrays` by name, compressed; OSError, which names the path, where it cannot."""
    packed = io.BytesIO()  # numpy's archive, left open by a failing file, would fail again later
    np.savez_compressed(packed, **arrays)
    with atomic_write(path) as file:
        file.write(packed.getbuffer())


def save_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Writes `image` (H, W, 3); OSError, which names the path, where it cannot."""
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, format="png")


class Board:
    """TensorBoard's log, as a context manager; it may fail, and the run goes on without it.

    `tensorboardX.SummaryWriter` writes from a thread that a full disk ends, whereupon the run waits
    for it for ever; and what it holds when the process is killed is lost. Here events are written
    by the caller, and on disk at most `FLUSH_SECONDS` later or with `flush`.
    """

    def __init__(self, folder: Path | None, step: int):
        """Starts a file in `folder`; what a killed run logged beyond `step` is purged.

        Without a folder nothing is written.
        """
        self.folder, self.events = folder, None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # names hold the second, so that a start within the same one would write over the file
        self.events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self.flushed = 0.0
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._write(step, summary=summary.scalar(tag, value))

    def add_image(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """`image` is (H, W, C)."""
        self._write(step, summary=summary.image(tag, image, dataformats="HWC"))

    def flush(self) -> None:
        """Whatever was added is on disk when this returns."""
        if self.events:
            with self._failing():
                self.events.flush()
                self.flushed = time.monotonic()

    def _write(self, step: int, **content) -> None:
        if self.events:
            with self._failing():
                self.events.write_event(Event(step=step, wall_time=time.time(), **content))
            if time.monotonic() - self.flushed > FLUSH_SECONDS:
                self.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning(f"{self.folder}: {error}; nothing more is written there")
            self.events = None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error) -> None:
        self.flush()


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of TensorBoard's files, as far as they are whole."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(folder.glob("events.out.tfevents.*")):  # names begin with the time
        try:
            for event in map(Event.FromString, tfrecords.whole_records(path)):
                if event.session_log.status == SessionLog.START:  # a run resumed before this step
                    for tag, points in curves.items():
                        curves[tag] = {s: v for s, v in points.items() if s < event.step}
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        curves[value.tag][event.step] = value.simple_value
        except DecodeError:
            log.warning(f"{path} is damaged; the loss curve lacks what follows in it")
    return {tag: sorted(points.items()) for tag, points in curves.items()}
