"""Files that are either complete or absent: atomic writing, and checkpoints that are checked."""

import contextlib
import errno
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

CHECKPOINT_KEYS = ("model", "ema", "optimizer", "step")
FOLDER = 0x10  # the attribute of a zip's record for which torch leaves a tensor's memory unread


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError raised within the `with` block that names no file (a full disk) names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the `with` block ends without an error.

    It is written beside `path`, flushed to disk and renamed, so that `path` never holds a part;
    what a kill leaves beside it is overwritten by the next write. With `previous`, what was at
    `path` is kept there.

    Raises:
        OSError: it cannot be written; the message names the file, and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            with open(beside, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(beside, path)
            _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that led here says more
            beside.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Flushes the names in `folder` to disk: a renamed file survives a power cut only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to flush for a folder
            raise
    finally:
        os.close(descriptor)


def save_checkpoint(path: Path, state: dict, previous: Path | None = None) -> None:
    """Writes `state`, a dictionary of tensors, numbers, lists and dictionaries, to `path`.

    The file is read back and checked before it takes the place of an earlier one, which goes on
    as `previous`. Raises OSError as `atomic_write` does, and where the check fails.
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
    """The dictionary saved at `path`, its tensors on the CPU; no code in the file is run.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is damaged, or not a checkpoint of this program.
    """
    try:
        with naming(path), open(path, "rb") as file:
            _check_records(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes zipfile and the unpickler fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to nowhere
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint: {reason}") from error
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(state, dict) or k not in state]
    if missing:
        raise ValueError(f"{path} is not a training checkpoint: it has no {', '.join(missing)}")
    return state


def _check_records(file: BinaryIO) -> None:
    """Raises ValueError (BadZipFile from some damage) where a record is not what was written.

    What `torch.save` writes is a zip file with a CRC-32 of every record, which `torch.load` does
    not look at. Reading at 4 GB/s, the check costs a fraction of the writing.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError("it is cut short, or not from torch.save of PyTorch 1.6 or later")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > file.seek(0, os.SEEK_END):
            raise ValueError("its records are larger than the file")
        if any(record.external_attr & FOLDER for record in records):
            raise ValueError("it is damaged: a record is marked as a folder")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"it is damaged: the checksum of its record {damaged} differs")
