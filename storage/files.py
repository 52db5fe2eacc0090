"""Files: opened only where they are regular, written whole or not at all, arrays, pictures."""

import contextlib
import errno
import io
import json
import logging
import os
import stat
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)

KINDS = {"f": "float", "i": "int", "u": "uint", "b": "bool", "U": "str"}  # of numpy's dtypes
MAX_JSON = 2**24  # bytes; parsed, they take up to twenty times as much
LARGEST = 1e30  # of the numbers in a file: what is computed from them stays finite


def open_regular(path: Path, mode: str = "rb", follow: bool = True) -> BinaryIO:
    """Open the file at `path` as `open` does, but only a regular one.

    A FIFO would make the reader wait, and a device may never end.

    Args:
        path: of any file, a stranger's too.
        mode: binary, as of `open`.
        follow: a link to the file will do. What this program writes to under a name that a stranger
            may have put in the folder must be no link.

    Raises:
        OSError: it cannot be opened, or is a link that is not to be followed, a hard one too.
        ValueError: it is no regular file.
    """

    def open_descriptor(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW), 0o666)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and (follow or status.st_nlink == 1):
            return descriptor
        os.close(descriptor)
        if stat.S_ISREG(status.st_mode):
            raise OSError(errno.EMLINK, "it is a hard link to another file: remove it", str(path))
        raise ValueError("it is not a file, or no regular file but a FIFO or a device")

    return open(path, mode, opener=open_descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the `with` block, name `path` in an OSError that names no file (a full disk)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


@contextlib.contextmanager
def refusing(path: Path, says: str) -> Iterator[None]:
    """Within the `with` block, turn any error of a damaged file into a ValueError.

    Its message is "{path} {says}: {reason}". An OSError stays one, and names `path`.
    """
    try:
        with naming(path):
            yield
    except Exception as error:  # a damaged file makes zipfile and others fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to nowhere
            raise
        damaged = "" if type(error) is ValueError else "it is damaged: "  # Python's own errors
        raise ValueError(f"{path} {says}: {damaged}{one_line(error)}") from error


@contextlib.contextmanager
def about(title: object) -> Iterator[None]:
    """Within the `with` block, put `title` before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from error


def read_json(path: Path, says: str) -> Any:
    """The content of the JSON file at `path`, of at most `MAX_JSON` bytes; see `refusing`."""
    with refusing(path, says), open_regular(path) as file:
        content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON >> 20} MiB")
        return json.loads(content)


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the `with` block ends without an error.

    It is written beside `path`, flushed to disk and renamed, so that `path` is never incomplete;
    what a kill leaves beside it is removed by the next write. With `previous`, what was at
    `path` is kept there.

    Raises:
        OSError: it cannot be written; the message names the file, and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            beside.unlink(missing_ok=True)
            with open_regular(beside, "x+b", follow=False) as file:
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
    """Flush the names in `folder` to disk: a renamed file survives a power cut only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems have nothing to flush for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def save_npz(path: Path, **arrays) -> None:
    """Write `arrays` by name, compressed; OSError, which names the path, where it cannot."""
    packed = io.BytesIO()  # numpy's archive, left open by a failing file, would fail again later
    np.savez_compressed(packed, **arrays)
    if sum(np.asarray(array).nbytes for array in arrays.values()) > may_unpack_to(packed.tell()):
        packed = io.BytesIO()
        np.savez(packed, **arrays)  # `read_arrays` would refuse the compressed file
    with atomic_write(path) as file:
        file.write(packed.getbuffer())


def save_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write `image` (H, W, 3 or 1); OSError, which names the path, where it cannot."""
    with atomic_write(path) as file:
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, format="png")


def open_entry(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """The entry `name` of a zip file, to be read; what is read bounds the memory it takes.

    Raises:
        KeyError: there is no such entry.
        ValueError: it is neither stored nor deflated. Python unpacks bzip2 and LZMA without a
            bound, however few bytes are asked for.
    """
    method = archive.getinfo(name).compress_type
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = zipfile.compressor_names.get(method, f"method {method}")
        raise ValueError(f"its entry {name} is compressed by {method}; only deflate is read")
    return archive.open(name)


def read_entry_array(archive: zipfile.ZipFile, name: str) -> NDArray:
    """The array `name` of an open .npz file; ValueError or KeyError where it is none."""
    with about(name), open_entry(archive, f"{name}.npy") as file:
        # numpy asks for as much as a header claims, and zipfile unpacks what it is asked for
        pieces = SimpleNamespace(read=lambda size: file.read(min(size, 2**20)))
        return plain(np.lib.format.read_array(pieces, allow_pickle=False))


def plain(array: NDArray) -> NDArray:
    """`array` in the byte order of this machine, and with floats of at most 64 bits.

    PyTorch takes no others.
    """
    dtype = array.dtype
    if dtype.kind == "f" and dtype.itemsize > 8:
        with np.errstate(over="ignore"):  # an infinity is refused where numbers are checked
            return array.astype(np.float64)
    return array.astype(dtype.newbyteorder("="), copy=False)


def may_unpack_to(size: int) -> int:
    """Bytes that an .npz or image file of `size` bytes may hold: untrusted files claim anything."""
    return max(2**26, 100 * size)


def read_arrays(path: Path, names: Collection[str] = ()) -> dict[str, NDArray]:
    """The arrays of the .npz file at `path`, of `names` only where there are any.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or damaged, or unpacks to much more than its size.
    """
    with (
        refusing(path, "is not an array file of this program"),
        open_regular(path) as file,
        zipfile.ZipFile(file) as archive,
    ):
        size = sum(entry.file_size for entry in archive.infolist())
        if size > may_unpack_to(path.stat().st_size):
            raise ValueError(f"it unpacks to {size:,} bytes")
        every = [name.removesuffix(".npy") for name in archive.namelist()]
        names = [name for name in every if name in names] if names else every
        return {name: read_entry_array(archive, name) for name in names}


# {name: (kinds of its dtype, as numpy calls them, and its shape)}; None is any length.
Spec = Mapping[str, tuple[str, tuple[int | None, ...]]]


def check_arrays(path: Path, arrays: dict, spec: Spec, finite: bool = True) -> dict:
    """The arrays that `spec` names, of `arrays` from `path`, checked.

    Raises:
        ValueError: one is missing, has another kind of dtype or shape, or, where they have to be
            `finite`, holds NaN or a magnitude of `LARGEST` or more.
    """
    for name, (kinds, shape) in spec.items():
        if name not in arrays:
            raise ValueError(f"{path} has no {name}")
        array = arrays[name]
        lengths = zip(array.shape, shape, strict=False)
        alike = array.ndim == len(shape) and all(n in (m, None) for m, n in lengths)
        if array.dtype.kind not in kinds or not alike:
            expected = f"{' or '.join(KINDS[kind] for kind in kinds)} {shape}".replace("None", "n")
            raise ValueError(f"{path}: {name} is {array.dtype} {array.shape}, not {expected}")
        measured = finite and array.size and array.dtype.kind == "f"
        if measured and not -LARGEST < array.min() <= array.max() < LARGEST:
            raise ValueError(f"{path}: {name} holds numbers that are not finite or too large")
    return {name: arrays[name] for name in spec}


@contextlib.contextmanager
def sparing_time(what: str) -> Iterator[None]:
    """Within the `with` block write what only spares time; where it fails, one line says so."""
    try:
        yield
    except OSError as error:
        log.warning(f"{what} not kept for the next start, which only costs time: {error}")


def cached(
    path: Path,
    origin: dict,
    compute: Callable[[], dict],
    names: Collection[str] = (),
    spec: Spec | None = None,
    optional: bool = False,
) -> dict:
    """The arrays that `compute` gives, and the `seconds` that it took.

    They are read from `path` where they are there, of this `origin`, and have all `names`, and
    those of `spec` as it says. An `optional` file need not be written; see `sparing_time`.
    """
    spec = spec or {}
    words = json.dumps(origin, sort_keys=True, default=str)
    try:
        arrays = read_arrays(path)
        if str(arrays.get("origin")) == words and {*names, *spec, "seconds"} <= arrays.keys():
            check_arrays(path, arrays, spec, finite=False)
            return arrays
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning(f"{error}; it is not used")
    start = time.perf_counter()
    results = compute()
    results |= {"seconds": time.perf_counter() - start, "origin": words}
    with sparing_time(f"{path.name} is") if optional else contextlib.nullcontext():
        save_npz(path, **results)
    return results


def one_line(error: Exception) -> str:
    """The message of `error` in one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[-200:]
