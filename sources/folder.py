"""The user's own images: a folder or zip of image files, an .npy or an .npz."""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sources.base import PerProcess, Picture, Source, Unreadable, View, held_out
from sources.images import cropped_then_resized, decode_image
from storage.files import one_line, open_entry, read_entry_array

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_FILE_BYTES = 2**28  # of one image, as it is read or unpacked; Pillow bounds the pixels
TEST_NAMES = ("test", "validation", "valid", "val")  # of the split to test on; the first counts


def open_folder(data, split: str) -> Source:
    """The images at `data.path`: files of a folder or a zip, or arrays of an .npy or an .npz.

    Files of all sub-folders count, in the order of their names; links to files are followed, links
    to folders are not. The splits are those that `given_splits` finds among the sub-folders or the
    arrays of an .npz, else a fixed random tenth is held out to test on. Where `data.num_channels`
    is 0, a file gives as many as it needs (see `decode_image`), an array those it has.
    Raises ValueError or OSError where there is nothing to read, or not what it should be.
    """
    path = _path(data)
    if _is_array(path):
        images, index = _array(path, split, data.num_channels, data.resident_bytes)
    else:
        if data.num_channels not in (0, 1, 3):
            raise ValueError(f"data.num_channels must be 1 or 3, not {data.num_channels}")
        names, open_one = _list(path)
        tops = _tops(names)
        if given := given_splits(tops):
            index = np.flatnonzero([top.lower() == given[split].lower() for top in tops])
        else:
            index = held_out(len(names), split)
        images = Files(path, names, open_one, data.num_channels)
    return View(images, partial(cropped_then_resized, size=data.image_size), index)


def splits_of(data) -> dict[str, str]:
    """What holds the splits of the images at `data.path`; see `given_splits`."""
    path = _path(data)
    if not _is_array(path):
        return given_splits(_tops(_list(path)[0]))
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


def read_images(key: str, name: str, channels: int) -> list[Picture]:
    """The images of a file, a folder or a .zip, in the order of their names.

    `key` is what `name` comes from; `channels` as of `decode_image`. Raises FileNotFoundError where
    there is nothing, ValueError where an image cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{key}={name} does not exist")
    if path.is_file() and _is_image(path.name):
        return [Files(path.parent, [path.name], partial(open_below, path.parent), channels)[0]]
    files = Files(path, *_list(path, key), channels)
    return [files[i] for i in range(len(files))]


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


def _list(path: Path, key: str = "data.path") -> tuple[list[str], Callable[[str], IO[bytes]]]:
    """The names of the image files in a folder or zip, and what opens one of them."""
    if path.is_file():
        archive = PerProcess(partial(zipfile.ZipFile, path))
        try:
            names, open_one = set(archive().namelist()), partial(_open_in, archive)
        except Exception as error:  # a damaged directory makes it fail in any way
            says = f"is no folder, .npy, .npz or zip file: {one_line(error)}"
            raise ValueError(f"{key}={path} {says}") from error
    else:
        names, open_one = _files_below(path), partial(open_below, path)
    images = sorted(filter(_is_image, names))
    if not images:
        raise ValueError(f"{key}={path} holds no images ({', '.join(SUFFIXES)})")
    return images, open_one


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
    given = given_splits(file.files)
    if not given and len(file.files) != 1:
        raise ValueError(f"it needs one array, or train and test; it has {file.files}")
    name = given.get(split, file.files[0])
    size = file.zip.getinfo(f"{name}.npy").file_size
    if size > limit:
        beyond = f"more than data.resident_bytes={limit:,}; an .npy is read from disk"
        raise ValueError(f"{name} unpacks to {size:,} bytes, {beyond}")
    return read_entry_array(file.zip, name), bool(given)
