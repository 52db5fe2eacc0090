"""The user's own images: a folder or zip of image files, an .npy or an .npz."""

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sources import digests
from sources.base import Classes, PerProcess, Picture, Source, Unreadable, View, held_out
from sources.images import cropped_then_resized, decode_image
from storage.files import one_line, open_entry, read_entry_array

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_FILE_BYTES = 2**28  # of one image, as it is read or unpacked; Pillow bounds the pixels
LABELS = "labels"  # of an .npz: the array, or the end of its name
METADATA = "dataset.json"  # of EDM's dataset_tool.py: the class labels of images by their names
TEST_NAMES = ("test", "validation", "valid", "val")  # of the split to test on; the first counts


def open_folder(data, split: str) -> Source:
    """The images at `data.path`: files of a folder or a zip, or arrays of an .npy or an .npz.

    Files of all sub-folders count, in the order of their names; links to files are followed, links
    to folders are not. The splits are those that `given_splits` finds among the sub-folders or the
    arrays of an .npz, else a fixed random tenth is held out to test on. Where `data.num_channels`
    is 0, a file gives as many as it needs (see `decode_image`), an array those it has. Class labels
    are those of a `dataset.json`, else the folders below those of the splits, numbered in the order
    of their names; of an .npz the array `labels`, or `train_labels` and `test_labels`.
    Raises ValueError or OSError where there is nothing to read, or not what it should be.
    """
    path = _path(data)
    if _is_array(path):
        images, index = _array(path, split, data.num_channels, data.resident_bytes)
        digest = partial(digests.of_zip, path) if isinstance(images, np.ndarray) else None
        classes = partial(_array_classes, path, split, len(images), data.resident_bytes)
    else:
        if data.num_channels not in (0, 1, 3):
            raise ValueError(f"data.num_channels must be 1 or 3, not {data.num_channels}")
        listed = _list(path)
        tops, names = _tops(listed.names), listed.names
        if given := given_splits(tops):
            index = np.flatnonzero([top.lower() == given[split].lower() for top in tops])
            kept = {name.lower() for name in given.values()}
            names = [name for name, top in zip(names, tops, strict=True) if top.lower() in kept]
        else:
            index = held_out(len(names), split)
        images = Files(path, listed.names, listed.open, data.num_channels)
        classes = partial(_file_classes, path, listed, names, below_split=bool(given))
        labels = [listed.metadata] if listed.metadata and data.num_classes else []
        content = data.digest == "content"
        digest = partial(digests.of_files, path, listed.archive, listed.names, labels, content)
    prepare = partial(cropped_then_resized, size=data.image_size)
    return View(images, prepare, index, classes, digest)


def splits_of(data) -> dict[str, str]:
    """What holds the splits of the images at `data.path`; see `given_splits`."""
    path = _path(data)
    if not _is_array(path):
        return given_splits(_tops(_list(path).names))
    content = np.load(path, mmap_mode="r", allow_pickle=False)
    return given_splits(getattr(content, "files", ()))  # those of an .npz; an .npy has none


def given_splits(names: Iterable[str]) -> dict[str, str]:
    """Which of `names` are those of the splits "train" and "test", in any case.

    Beside `train` there has to be one of `TEST_NAMES`, else the result is empty.
    """
    found = {name.lower(): name for name in sorted(set(names))}
    held = [found[name] for name in TEST_NAMES if name in found]
    return {"train": found["train"], "test": held[0]} if "train" in found and held else {}


def _path(data) -> Path:
    if not data.path:
        kinds = "a folder or .zip of images, .npy or .npz"
        raise ValueError(f"data.dataset='folder' needs data.path, {kinds}")
    path = Path(data.path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data.path={data.path} does not exist")
    return path


def read_images(key: str, name: str, channels: int) -> dict[str, Picture]:
    """The images of a file, a folder or a .zip by their names, in the order of these.

    `key` is what `name` comes from; `channels` as of `decode_image`. Raises FileNotFoundError where
    there is nothing, ValueError where an image cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{key}={name} does not exist")
    if path.is_file() and _is_image(path.name):
        files = Files(path.parent, [path.name], partial(open_below, path.parent), channels)
    else:
        listed = _list(path, key)
        files = Files(path, listed.names, listed.open, channels)
    return {name: files[i] for i, name in enumerate(files.names)}


# --- image files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Encoded images by name, each of which `open` opens; nothing is extracted to disk."""

    where: Path
    names: list[str]
    open: Callable[[str], IO[bytes]]
    channels: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Picture:
        try:
            with self.open(self.names[i]) as file:
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
            return decode_image(data, self.channels)
        except Exception as error:  # a damaged file makes the decoder fail in any way
            raise Unreadable(f"{self.where}/{self.names[i]}: {one_line(error)}") from error


def open_below(folder: Path, name: str) -> IO[bytes]:
    """A regular file below `folder`; ValueError where it is none."""
    path = folder / name
    if not path.is_file():  # a pipe or a device could be read for ever
        raise ValueError("not a file")
    return open(path, "rb")


def _open_in(archive: PerProcess, name: str) -> IO[bytes]:
    return open_entry(archive(), name)


class Listed(NamedTuple):
    """The image files of a folder or zip, what opens one by its name, and the `dataset.json`.

    `archive` gives the zip file, in each process; it is None for a folder.
    """

    names: list[str]
    open: Callable[[str], IO[bytes]]
    metadata: str | None
    archive: PerProcess | None


def _list(path: Path, key: str = "data.path") -> Listed:
    archive = None
    if path.is_file():
        archive = PerProcess(partial(zipfile.ZipFile, path))
        try:
            names, open_one = set(archive().namelist()), partial(_open_in, archive)
        except Exception as error:  # a damaged directory makes it fail in any way
            says = f"is no folder, .npy, .npz or zip file: {one_line(error)}"
            raise ValueError(f"{key}={path} {says}") from error
    else:
        names, open_one = set(_files_below(path)), partial(open_below, path)
    images = sorted(filter(_is_image, names))
    if not images:
        raise ValueError(f"{key}={path} holds no images ({', '.join(SUFFIXES)})")
    top = f"{images[0].partition('/')[0]}/{METADATA}"  # of a zip that holds one folder
    metadata = next((n for n in (METADATA, top) if n in names), None)
    return Listed(images, open_one, metadata, archive)


def _files_below(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root, onerror=_raise):
        below = Path(folder).relative_to(root)
        yield from ((below / file).as_posix() for file in files)


def _raise(error: OSError) -> None:
    raise error


def _is_image(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")  # "._x" is macOS's own


def _tops(names: list[str]) -> list[str]:
    """The top folder of each file; the one below where a single folder holds all files."""
    pieces = [name.split("/", 2) for name in names]
    level = 1 if len({p[0] for p in pieces}) == 1 else 0
    return ["".join(p[level : level + 1]) for p in pieces]


def _file_classes(path: Path, listed: Listed, names: list[str], below_split: bool) -> Classes:
    """The classes of all files of `listed`, of which `names` belong to a split."""
    if listed.metadata:
        numbers, folder = _read_metadata(path, listed), listed.metadata.removesuffix(METADATA)
        found, classes = [numbers.get(n.removeprefix(folder)) for n in listed.names], ()
    else:
        level = below_split + (len({name.split("/", 1)[0] for name in listed.names}) == 1)
        folders = {name: _folder_at(name, level) for name in listed.names}
        classes = tuple(sorted({folders[name] for name in names} - {None}))
        numbers = {name: i for i, name in enumerate(classes)}
        found = [numbers.get(folders[name]) for name in listed.names]
    labels = dict(zip(listed.names, found, strict=True))
    if missing := [name for name in names if labels[name] is None]:
        raise ValueError(
            f"{len(missing):,} of {len(names):,} images of data.path={path} have no class label, "
            f"such as {missing[0]}: each class needs a folder, or each image a line in {METADATA}"
        )
    return Classes(np.array([-1 if k is None else k for k in found], np.int64), classes)


def _folder_at(name: str, level: int) -> str | None:
    folders = name.split("/")[:-1]
    return folders[level] if level < len(folders) else None


def _read_metadata(path: Path, listed: Listed) -> dict[str, int]:
    """The class label of each image in `dataset.json`, {"labels": [["path", label], ...]}."""
    try:
        with listed.open(listed.metadata) as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        labels = json.loads(content)["labels"]
        if not labels:
            raise ValueError("it has no labels")
        numbers = dict(labels)
        for name, label in numbers.items():
            if type(name) is not str or type(label) is not int or label < 0:
                raise ValueError(f"{name!r:.100} has the label {label!r:.50}, no class's number")
        return numbers
    except Exception as error:  # a damaged file fails in any way
        where = f"data.path={path}: {listed.metadata}"
        raise ValueError(f"{where} gives no class labels: {one_line(error)}") from error


# --- arrays ---------------------------------------------------------------------------------------


def _is_array(path: Path) -> bool:
    return path.suffix.lower() in (".npy", ".npz")


def _array(path: Path, split: str, channels: int, limit: int) -> tuple[Source, NDArray[np.int64]]:
    """The images of an .npy or .npz, and which of them belong to `split`."""
    mapped = PerProcess(partial(np.load, path, mmap_mode="r", allow_pickle=False))
    try:
        images, given = mapped(), False
        if isinstance(images, np.lib.npyio.NpzFile):
            with images as file:
                images, given = _unpacked(file, split, limit)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes numpy fail in any way
        raise ValueError(f"data.path={path} cannot be read: {one_line(error)}") from error
    known, says = ((channels,), ", as data.num_channels says") if channels else ((1, 3), "")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in known:
        expected = f"uint8 images (n, H, W, {' or '.join(map(str, known))}){says}"
        raise ValueError(
            f"data.path={path} must hold {expected}, not {images.dtype} {images.shape}"
        )
    if not images.size:
        raise ValueError(f"data.path={path} holds no images: its shape is {images.shape}")
    index = np.arange(len(images)) if given else held_out(len(images), split)
    return mapped if isinstance(images, np.memmap) else images, index


def _unpacked(file, split: str, limit: int) -> tuple[NDArray, bool]:
    """The array of `split` in an .npz, or its only array; and whether the file gives the splits."""
    names = [name for name in file.files if not name.lower().endswith(LABELS)]
    given = given_splits(names)
    if not given and len(names) != 1:
        raise ValueError(f"it needs one array, or train and test; it has {file.files}")
    return _read_bounded(file, given.get(split, names[0]), limit), bool(given)


def _read_bounded(file, name: str, limit: int) -> NDArray:
    size = file.zip.getinfo(f"{name}.npy").file_size
    if size > limit:
        beyond = f"more than data.resident_bytes={limit:,}; an .npy is read from disk"
        raise ValueError(f"{name} unpacks to {size:,} bytes, {beyond}")
    return read_entry_array(file.zip, name)


def _array_classes(path: Path, split: str, n: int, limit: int) -> Classes:
    """The classes of the `n` images that the .npz at `path` gives for `split`."""
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError(f"an .npy has none; put images and {LABELS} in an .npz")
        with content as file:
            given = given_splits(file.files)
            name = f"{given[split]}_{LABELS}" if given else LABELS
            if name not in file.files:
                raise ValueError(f"there is no array {name}")
            labels = _read_bounded(file, name, max(limit, 8 * n + 1024))
        if labels.dtype.kind not in "iu" or labels.shape != (n,):
            expected = f"{n} whole numbers, one for each image"
            raise ValueError(f"{name} must be {expected}, not {labels.dtype} {labels.shape}")
        if labels.min() < 0:
            raise ValueError(f"{name} has the label {labels.min()}; classes are numbered from 0")
        return Classes(labels.astype(np.int64))
    except OSError:
        raise
    except Exception as error:  # a damaged file makes numpy fail in any way
        raise ValueError(f"data.path={path} gives no class labels: {one_line(error)}") from error
