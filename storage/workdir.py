"""The workdir of a run: names of its files, and one writer at a time.

.checkpoints.lock                     held by the process that trains
config.json                           the config of the first start
stdout.txt                            the log of all starts
tensorboard/                          curves and pictures
metrics.jsonl                         the same numbers, one line for each step logged
wandb/                                id and files of Weights & Biases, where it logs
checkpoints/checkpoint_{step}.pth     numbered states, to evaluate
checkpoints/best.pth                  the state with the best metrics along the training
checkpoints/*.pkl, *.pt               snapshots of EDM and PFGM++, placed there to be evaluated
checkpoints-meta/checkpoint.pth       the newest state, to go on from
checkpoints-meta/checkpoint.prev.pth  the one before, where the newest is damaged
samples/iter_{step}/                  pictures along the way
samples/step_{step}/                  samples of --mode sample without --outdir
model.safetensors                     the shared file of --mode export
.{eval_folder}.lock, {eval_folder}/   lock and results of an evaluation
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
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tqdm.contrib.logging import logging_redirect_tqdm

from storage.files import about, atomic_write, naming, one_line, open_regular, read_json

log = logging.getLogger(__name__)

SETTINGS = "settings.json"  # of a folder of samples

FOLDERS = {"checkpoints", "checkpoints-meta", "samples", "tensorboard", "wandb"}
# No evaluation may take these places.
TRAININGS_OWN = FOLDERS | {"config.json", "metrics.jsonl", "stdout.txt"}

# Pictures that are no samples, and files that lie beside them where this program wrote them.
PICTURES = re.compile(
    r"(grid|encoded|sample)\.png|(film|between)\.(webp|gif)"
    r"|(ode_images|data_images|classes|nearest|interpolation|rescale|restoration)_\d+\.png"
)
BESIDE_PICTURES = re.compile(
    r"settings\.json|report\.html|report_\d+\.npz|(samples?|encoded|film|between|data_halves)\.npz"
)


def is_workdir(folders: Collection[str], files: Collection[str]) -> bool:
    """True if a folder with these `folders` and `files` is the workdir of a run."""
    return "config.json" in files and not {"checkpoints", "checkpoints-meta"}.isdisjoint(folders)


def own_pictures(files: Iterable[str]) -> set[str]:
    """Names among the `files` of a folder that are pictures of this program and no samples.

    The name alone is not enough, since a user's images may all be called sample.png, each in a
    folder of its own: other images, or files that this program writes beside, must be there too.
    """
    files = set(files)
    pictures = {name for name in files if PICTURES.fullmatch(name)}
    images = {name for name in files if name.lower().endswith((".png", ".webp", ".gif"))}
    beside = any(map(BESIDE_PICTURES.fullmatch, files))
    return pictures if beside or images - pictures else set()


def checkpoint_path(workdir: Path, step: int) -> Path:
    """The numbered state of `step`."""
    return workdir / "checkpoints" / f"checkpoint_{step}.pth"


def best_path(workdir: Path) -> Path:
    """The state with the best metrics along the training (`training.metric_freq`)."""
    return workdir / "checkpoints" / "best.pth"


def resume_paths(workdir: Path) -> tuple[Path, Path]:
    """The newest state, and the one before it."""
    folder = workdir / "checkpoints-meta"
    return folder / "checkpoint.pth", folder / "checkpoint.prev.pth"


def evaluation_folder(workdir: Path, name: str) -> Path:
    """The folder `name` in the workdir, for the results of an evaluation.

    An absolute path may lead elsewhere, since a run need not be one that can be written to.

    Raises:
        ValueError: a relative one leads out of the workdir, or it is one of training's own.
    """
    folder = workdir / name
    inside = folder.resolve()
    if Path(name).is_absolute() and not inside.is_relative_to(workdir.resolve()):
        return folder
    if not inside.is_relative_to(workdir.resolve()):
        raise ValueError(f"--eval_folder={name} lies outside the workdir {workdir}")
    first = [*inside.relative_to(workdir.resolve()).parts, "."][0]
    if first.startswith(".") or first in TRAININGS_OWN:
        raise ValueError(f"--eval_folder={name!r} is training's own place; name another, as 'eval'")
    return folder


def refuse_links(workdir: Path, *names: str) -> None:
    """Raise ValueError where a folder that a run writes to is a link that leads out of the workdir.

    A stranger's link could lead anywhere. The workdir itself may be one, or lie behind one. The
    folders are those of training and `names`, with the folders in them.
    """

    def check(path: Path) -> None:
        if path.is_symlink() and path.is_dir() and not path.resolve().is_relative_to(inside):
            raise ValueError(
                f"{path} is a link to a folder outside the workdir, where nothing is written: put "
                "the folder in its place, or make the workdir itself the link"
            )

    inside = workdir.resolve()
    for folder in (workdir / name for name in sorted({*FOLDERS, *names})):
        check(folder)
        if folder.is_dir():
            with os.scandir(folder) as entries:  # of many samples, too, in a moment
                for entry in entries:
                    if entry.is_symlink():
                        check(folder / entry.name)


def check_settings(folder: Path, settings: dict) -> bool:
    """True if `folder` holds samples of these `settings`, a flat dictionary; False if none.

    Raises:
        ValueError: it holds samples of others, or of what is not known.
    """
    path, advice = folder / SETTINGS, "name another folder as --outdir"
    if not path.exists():
        if samples := sorted(folder.glob("*.png")):
            raise ValueError(f"it is not known what {samples[0]} is a sample of: {advice}")
        return False
    damaged = f"is damaged, so it is not known what is in the folder: {advice}"
    stored = read_json(path, damaged)
    if type(stored) is not dict:
        raise ValueError(f"{path} {damaged}")
    settings = json.loads(_words(settings))
    keys = sorted(settings.keys() | stored.keys())
    if changed := [key for key in keys if settings.get(key) != stored.get(key)]:
        which = [f"{k}: {stored.get(k)!r:.20} -> {settings.get(k)!r:.20}" for k in changed[:3]]
        more = f" and {len(changed) - 3} more" if changed[3:] else ""
        raise ValueError(
            f"{folder} holds samples of other settings ({', '.join(which)}{more}): {advice}"
        )
    return True


def save_settings(folder: Path, settings: dict) -> None:
    """Write the `settings` of the samples that will be in `folder`."""
    with atomic_write(folder / SETTINGS) as file:
        file.write(_words(settings).encode())


def _words(settings: dict) -> str:
    return json.dumps(settings, indent=1, sort_keys=True, default=str)


# --- one writer at a time, and its log ------------------------------------------------------------


def check_writable(folder: Path, flag: str) -> None:
    """Raise PermissionError where `folder`, which `flag` names elsewhere, cannot be written to."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{place} cannot be written to: put the results elsewhere by {flag}")


@contextlib.contextmanager
def open_workdir(workdir: Path, folder: Path, main: bool = True, flag: str = "") -> Iterator[None]:
    """Make the workdir; within the `with` block, no other process writes to `folder`.

    The log is appended to stdout.txt. Training and an evaluation name different folders, so that
    one does not keep the other out. Of several processes of one run only the `main` one writes; for
    the others nothing is done.

    Raises:
        OSError: the folder cannot be written, which `flag` would name elsewhere, or another process
            writes to it.
    """
    if not main:
        yield
        return
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir {workdir} is a file; name a folder")
    check_writable(folder, flag)
    workdir.mkdir(parents=True, exist_ok=True)
    place, top = folder.absolute(), workdir.absolute()
    inside = [place.relative_to(top)] if top in place.parents else []
    refuse_links(workdir, *map(str, inside))
    with _lock(folder), _log_file(workdir / "stdout.txt"), logging_redirect_tqdm():
        yield


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Within the `with` block, lock `.{name}.lock` beside `folder`; the file names the process.

    The kernel holds the lock, so it ends with the process, however that ends, and is not inherited
    by workers. Over NFS it holds between machines.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not path.exists() and not os.access(path.parent, os.W_OK):
        log.warning(f"{path} cannot be written; see to it that no other process writes to {folder}")
        yield
        return
    with about(path):
        file = open_regular(path, "a+b", follow=False)
    with file:
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
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


class _LogFile(logging.FileHandler):
    """A log whose file may fail: the console hears of it once, and the run goes on."""

    failed = False

    def _open(self) -> TextIO:
        file = open_regular(Path(self.baseFilename), "ab", follow=False)
        return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            log.warning(f"{self.baseFilename}: {sys.exc_info()[1]}; lines may be missing there")


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    try:
        handler = _LogFile(path, mode="a")
    except (OSError, ValueError) as error:  # no place to write, a link, a FIFO
        log.warning(f"{one_line(error)}: the log is on the console only")
        yield
        return
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
