"""CIFAR-10 and CIFAR-100 in the files of their authors: archives, or the folders in them.

Of the archives for Python the pickles are read as data (`storage.inert_pickle`), and nothing is
extracted to disk.
"""

import io
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sources.base import MOST_CLASSES
from sources.files import MAX_FILE_BYTES, read_bounded, unpacked
from sources.loaded import Loaded, Part
from sources.tars import in_order, open_archive
from storage.files import MAX_JSON, about, open_regular, refusing
from storage.inert_pickle import Record, Unpickler

PIXELS = 3 * 32 * 32  # bytes of an image: its red, green and blue plane
# The folders in the archives.
FOLDERS = "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"
NUMPY = {  # what pickles of arrays refer to
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.ndarray", "numpy.dtype"),
}


class Form(NamedTuple):
    """Names of the files of a form.

    `labels` is their key in a pickle or, of binary files, the number of bytes before each image, of
    which the last is its label.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: str
    labels: str | int


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
FORMS = (
    Form(BATCHES, ("test_batch",), "batches.meta", "labels"),
    Form(tuple(f"{n}.bin" for n in BATCHES), ("test_batch.bin",), "batches.meta.txt", 1),
    Form(("train",), ("test",), "meta", "fine_labels"),
    Form(("train.bin",), ("test.bin",), "fine_label_names.txt", 2),
)
FILES = {name for form in FORMS for name in (*form.train, *form.test, form.classes)}


def in_folder(path: Path) -> Loaded | None:
    """The data in the folder at `path`, or in the one of `FOLDERS` in it; None without any."""
    below = [path / name for name in FOLDERS if (path / name).is_dir()]
    for folder in (path, *(below if len(below) == 1 else ())):
        if form := _form({name for name in FILES if (folder / name).is_file()}):
            return _loaded(path, form, partial(_read_in, folder))
    return None


def _read_in(folder: Path, name: str) -> bytes:
    with open_regular(folder / name) as file:
        return read_bounded(file)


def in_archive(path: Path) -> Loaded | None:
    """The data in the tar file at `path`, packed by gzip or not; None where it has other files.

    Its files are read at once. Raises ValueError where it is damaged, or lacks some of them.
    """
    files = {}
    with refusing(path, "cannot be read as an archive of CIFAR"), open_regular(path) as file:
        with open_archive(unpacked(file)) as archive:
            for member in in_order(archive):
                folder, _, name = member.name.rpartition("/")
                if not member.isdir() and folder not in FOLDERS:
                    return None
                if name in FILES and member.isreg():
                    if not 0 <= member.size <= MAX_FILE_BYTES or name in files:
                        raise ValueError(f"{name} is there twice, or has {member.size:,} bytes")
                    files[name] = _read(archive, member)
        if (form := _form(files)) is None:
            raise ValueError(f"it lacks files of CIFAR; it has {', '.join(sorted(files))}")
    return _loaded(path, form, files.__getitem__)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    content = b"".join(iter(partial(file.read, 2**20), b""))
    if len(content) != member.size:
        raise ValueError(f"{member.name:.100} is cut off")
    return content


def _form(names: Mapping | set) -> Form | None:
    return next((f for f in FORMS if {*f.train, *f.test, f.classes} <= {*names}), None)


def _loaded(path: Path, form: Form, read: Callable[[str], bytes]) -> Loaded:
    parse = _of_binary if isinstance(form.labels, int) else _of_pickle
    names = _names_in_text if isinstance(form.labels, int) else _names_in_pickle

    def part(files: tuple[str, ...]) -> Part:
        parts = []
        for name in files:
            with about(f"data.path={path}: {name} is no file of CIFAR"):
                parts.append(parse(read(name), form.labels))
        return Part(*map(np.concatenate, zip(*parts, strict=True)))

    def class_names() -> tuple[str, ...]:
        with about(f"data.path={path}: {form.classes} is no file of CIFAR"):
            return names(read(form.classes))

    splits = {"train": partial(part, form.train), "test": partial(part, form.test)}
    return Loaded(path, splits, class_names)


def _images(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _of_binary(content: bytes, labels: int) -> Part:
    if not content or len(content) % (labels + PIXELS):
        raise ValueError(f"its size, {len(content):,} bytes, is not that of whole images")
    rows = np.frombuffer(content, np.uint8).reshape(-1, labels + PIXELS)
    return Part(_images(rows[:, labels:]), rows[:, labels - 1])


def _unpickled(content: bytes) -> dict:
    entries = Unpickler({}, NUMPY).load(io.BytesIO(content))
    if type(entries) is not dict:
        raise ValueError("it holds no dictionary")
    return entries


def _of_pickle(content: bytes, key: str) -> Part:
    """A pickle of Python 2: a dictionary with `data`, an array (n, 3072), and labels, a list."""
    entries = _unpickled(content)
    data, labels = entries.get("data"), entries.get(key)
    state = data.state if isinstance(data, Record) else None
    pixels = state[4] if type(state) is tuple and len(state) == 5 else None
    if type(pixels) is str:
        pixels = pixels.encode("latin-1")
    if type(labels) is not list or type(pixels) is not bytes:
        raise ValueError(f"it has no array of images and list of {key}")
    if not labels or len(pixels) != len(labels) * PIXELS or state[3]:
        raise ValueError(f"{len(pixels):,} bytes of pixels are not those of {len(labels):,} images")
    if any(type(label) is not int or not 0 <= label < MOST_CLASSES for label in labels):
        raise ValueError("a label is no class's number")
    return Part(_images(np.frombuffer(pixels, np.uint8)), np.array(labels, np.int64))


def _names_in_pickle(content: bytes) -> tuple[str, ...]:
    entries = _unpickled(content)
    names = entries.get("label_names", entries.get("fine_label_names"))
    if type(names) is not list or not all(type(name) is str for name in names):
        raise ValueError("it has no names of classes")
    return tuple(names)


def _names_in_text(content: bytes) -> tuple[str, ...]:
    if len(content) > MAX_JSON:
        raise ValueError(f"it is larger than {MAX_JSON >> 20} MiB")
    return tuple(line.strip() for line in content.decode().splitlines() if line.strip())
