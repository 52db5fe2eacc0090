"""Files that are either complete or absent: atomic writing, arrays, pictures, cached arrays."""

import contextlib
import errno
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)


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

    It is written beside `path`, flushed to disk and renamed, so that `path` is never incomplete;
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


def read_arrays(path: Path) -> dict[str, NDArray]:
    """The arrays of the .npz file at `path`.

    Raises:
        FileNotFoundError, PermissionError: it cannot be read.
        ValueError: it is no such file, or damaged.
    """
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(
            f"{path} is not an array file of this program: {one_line(error)}"
        ) from error


def read_arrays_if_whole(path: Path) -> dict:
    """The arrays at `path`; none where it does not exist, or is damaged, of which the log tells."""
    try:
        return read_arrays(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning(f"{error}; it is not used")
        return {}


def cached(path: Path, origin: dict, compute: Callable[[], dict]) -> dict:
    """The arrays that `compute` gives, from `path` where they are there and of this `origin`."""
    words = json.dumps(origin, sort_keys=True, default=str)
    found = read_arrays_if_whole(path)
    if str(found.get("origin")) != words:
        start = time.perf_counter()
        found = compute()
        found |= {"seconds": time.perf_counter() - start, "origin": words}
        save_npz(path, **found)
    return found


def one_line(error: Exception) -> str:
    """What `error` says, in one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[-200:]
