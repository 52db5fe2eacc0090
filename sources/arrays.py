"""Images and class labels in the arrays of an .npy or .npz file."""

import contextlib
import functools
import re
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from sources import digests, listing
from sources.base import Classes, PerProcess, Picture, View
from sources.files import MAX_FILE_BYTES
from sources.images import cropped_then_resized
from sources.rules import Rules
from sources.splits import held_out
from storage.files import one_line, open_regular, read_entry_array

LABELS = "labels"  # of an .npz: the array, or the end of its name


def is_array(path: Path) -> bool:
    """True if the name is that of an .npy or .npz."""
    return path.suffix.lower() in (".npy", ".npz")


class Arrays:
    """The images of the .npy or .npz at `data.path`, for either split.

    Attributes:
        split_names: names of the arrays that hold the splits; {} where there is one array.
    """

    def __init__(self, path: Path, rules: Rules):
        self.path, self._rules = path, rules
        self._unpacked = weakref.WeakValueDictionary()  # an array of both splits is held once

    @functools.cached_property
    def _names(self) -> list[str]:
        """Names of the arrays of images in an .npz; an .npy has none."""
        with _opened(self.path, f"data.path={self.path} cannot be read") as content:
            names = getattr(content, "files", ())
            return [name for name in names if not name.lower().endswith(LABELS)]

    @functools.cached_property
    def split_names(self) -> dict[str, str]:
        return self._rules.find_splits(self._names)

    @property
    def omitted(self) -> str:
        """Text on the arrays beside the splits."""
        return listing.in_words(listing.beside_splits("array", self._names, self.split_names))

    def open(self, data: ConfigDict, split: str) -> View:
        """The images of `split`; ValueError where the array is none of images."""
        with _opened(self.path, f"data.path={self.path} cannot be read") as content:
            is_packed = isinstance(content, NpzFile)
            images = self._unpack(content, split, data.resident_bytes) if is_packed else content
        says = ", as data.num_channels says" if data.num_channels else ""
        _check("data.path", self.path, images, data.num_channels, says)
        if not data.num_channels and images.shape[1] < 5 <= min(images.shape[2:]):
            raise ValueError(
                f"data.path={self.path} is {images.shape}, which looks like (n, C, H, W): "
                "transpose it to (n, H, W, C), or say "
                f"data.num_channels={images.shape[3]} if the channels are last"
            )
        n = len(images)
        return View(
            source=images if is_packed else PerProcess(partial(_mapped, self.path)),
            prepare=partial(cropped_then_resized, size=data.image_size),
            index=np.arange(n) if self.split_names else held_out(n, split),
            classes_of_all=partial(self._classes, split, n, data.resident_bytes),
            digest_of=partial(digests.of_zip, self.path) if is_packed else None,
        )

    def _unpack(self, file: NpzFile, split: str, limit: int) -> NDArray:
        if not self.split_names and len(self._names) != 1:
            raise ValueError(f"it needs one array, or train and test; it has {file.files}")
        name = self.split_names.get(split, self._names[0])
        if (images := self._unpacked.get(name)) is None:
            images = self._unpacked[name] = _read_bounded(file, name, limit)
        return images

    def _classes(self, split: str, n: int, limit: int) -> Classes:
        """The classes of the `n` images of the array of `split`."""
        with _opened(self.path, f"data.path={self.path} gives no class labels") as content:
            if not isinstance(content, NpzFile):
                raise ValueError(f"an .npy has none; put images and {LABELS} in an .npz")
            images = self.split_names.get(split)
            name = f"{images}_{LABELS}" if images else LABELS
            if images and name not in content.files:  # train_labels beside train_images
                name = re.sub("(_?images?)?$", f"_{LABELS}", images, count=1, flags=re.I)
            if name not in content.files:
                raise ValueError(f"there is no array {name}")
            labels = _read_bounded(content, name, max(limit, 8 * n + 1024))
            if labels.dtype.kind not in "iu" or labels.shape != (n,):
                expected = f"{n} whole numbers, one for each image"
                raise ValueError(f"{name} must be {expected}, not {labels.dtype} {labels.shape}")
            if labels.min() < 0:
                says = "classes are numbered from 0"
                raise ValueError(f"{name} has the label {labels.min()}; {says}")
            return Classes(labels.astype(np.int64))


def read_array(key: str, path: Path, channels: int) -> dict[str, Picture]:
    """The images of an .npy or .npz, the value of `key`, by the file's name and their number.

    They are uint8 (n, H, W, C), or one (H, W, C), with as many `channels` unless that is 0; of an
    .npz its only array or `samples`. Raises ValueError where there are no such images.
    """
    with _opened(path, f"{key}={path} cannot be read") as content:
        if isinstance(content, NpzFile):
            name = "samples" if "samples" in content.files else content.files[0]
            if name != "samples" and len(content.files) > 1:
                raise ValueError(f"it needs one array, or samples; it has {content.files}")
            content = _read_bounded(content, name, MAX_FILE_BYTES)
    images = content[None] if content.ndim == 3 else content
    _check(key, path, images, channels)
    if len(images) == 1:
        return {path.name: np.array(images[0])}
    return {f"{path.name}:{i}": np.array(image) for i, image in enumerate(images)}


def _mapped(path: Path) -> NDArray | NpzFile:
    open_regular(path).close()  # np.load would wait for a FIFO
    return np.load(path, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def _opened(path: Path, message: str) -> Iterator[NDArray | NpzFile]:
    """The content of the file; an error in reading it becomes one that begins with `message`."""
    try:
        content = _mapped(path)
        with content if isinstance(content, NpzFile) else contextlib.nullcontext():
            yield content
    except OSError:
        raise
    except Exception as error:  # a damaged file makes numpy fail in any way
        raise ValueError(f"{message}: {one_line(error)}") from error


def _check(key: str, path: Path, images: NDArray, channels: int, says: str = "") -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or channels not in (0, images.shape[3]):
        raise ValueError(
            f"{key}={path} must hold uint8 images (n, H, W, {channels or 'C'}){says}, not "
            f"{images.dtype} {images.shape}"
        )
    if not images.size:
        raise ValueError(f"{key}={path} holds no images: its shape is {images.shape}")


def _read_bounded(file: NpzFile, name: str, limit: int) -> NDArray:
    size = file.zip.getinfo(f"{name}.npy").file_size
    if size > limit:
        beyond = f"more than data.resident_bytes={limit:,}; an .npy is read from disk"
        raise ValueError(f"{name} unpacks to {size:,} bytes, {beyond}")
    return read_entry_array(file.zip, name)
