"""Images and class labels in the arrays of an .npy or .npz file."""

import contextlib
import functools
import re
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from sources import digests, listing, splits
from sources.base import Classes, Picture, View
from sources.files import MAX_FILE_BYTES
from sources.images import ImageSize, cropped_then_resized, to_size
from sources.npy import MAGIC, Header, StoredArray
from sources.rules import Rules
from sources.splits import bare, held_out
from storage.files import about, one_line, open_entry, open_regular, read_entry_array

# Words for class labels in the names of arrays: labels, train_labels, y_train.
LABELS = ("labels", "label", "targets", "target", "classes", "class", "y")
_IS_LABELS = re.compile(r"(labels?|targets?).*|.*(labels?|targets?)")
_AROUND = re.compile(rf"^(x|{splits.AROUND})|(x|{splits.AROUND})$")

# Python for the reader of a message, whose array is x.
CONVERSION = (
    "(255 * (x.astype(float) - low) / (high - low)).clip(0, 255).round().astype('uint8') "
    "with its values low and high for black and white"
)

Shape = tuple[int, ...]


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
    def _shapes(self) -> dict[str, Shape]:
        """Shapes of the arrays in an .npz by their names; {} of an .npy."""
        with _opened(self.path, f"data.path={self.path} cannot be read") as content:
            return {} if isinstance(content, StoredArray) else _shapes(content)

    @functools.cached_property
    def split_names(self) -> dict[str, str]:
        # x_train and x_test, too
        names = {re.sub("(?i)^x_?|_?x$", "", name): name for name in _of_images(self._shapes)}
        return {split: names[name] for split, name in self._rules.find_splits(names).items()}

    @property
    def omitted(self) -> str:
        """Text on the arrays beside the splits."""
        names = _of_images(self._shapes)
        return listing.in_words(listing.beside_splits("array", names, self.split_names))

    def open(self, data: ConfigDict, split: str) -> View:
        """The images of `split`; ValueError where the array does not hold images."""
        where = f"data.path={self.path}"
        with _opened(self.path, f"{where} cannot be read") as content:
            is_packed = isinstance(content, zipfile.ZipFile)
            images = self._unpack(content, split, data.resident_bytes) if is_packed else content
        shape, says = images.shape, ", as data.num_channels says" if data.num_channels else ""
        check(where, shape, images.dtype, data.num_channels, says)
        if len(shape) == 3 and shape[2] < 5 <= min(shape[:2]):
            raise ValueError(
                f"{where} is {shape}, which looks like one image (H, W, C): data are several, "
                "(n, H, W, C); grey images (n, H, W) so narrow are given as x[..., None]"
            )
        if not data.num_channels and len(shape) == 4 and shape[1] < 5 <= min(shape[2:]):
            raise ValueError(
                f"{where} is {shape}, which looks like (n, C, H, W): "
                "transpose it to (n, H, W, C), or say "
                f"data.num_channels={shape[3]} if the channels are last"
            )
        if not is_packed and images.is_fortran and images.nbytes <= data.resident_bytes:
            images = images.whole()  # the bytes of an image lie apart, and take long to read
        n = shape[0]
        return View(
            source=images,
            prepare=partial(_prepared, size=data.image_size),
            index=np.arange(n) if self.split_names else held_out(n, split),
            classes_of_all=partial(self._classes, split, n, data.resident_bytes),
            digest_of=partial(digests.of_zip, self.path) if is_packed else None,
        )

    def _unpack(self, archive: zipfile.ZipFile, split: str, limit: int) -> NDArray:
        names = _of_images(self._shapes)
        if not self.split_names and len(names) != 1:
            raise ValueError(
                f"it needs one array of images, or train and test; it has {_in_words(self._shapes)}"
            )
        name = self.split_names.get(split, names[0])
        if (images := self._unpacked.get(name)) is None:
            images = self._unpacked[name] = _read_bounded(archive, name, limit)
        return images

    def _classes(self, split: str, n: int, limit: int) -> Classes:
        """The classes of the `n` images of the array of `split`."""
        with _opened(self.path, f"data.path={self.path} gives no class labels") as content:
            if isinstance(content, StoredArray):
                raise ValueError("an .npy has none; put images and labels in an .npz")
            images, is_split = self.split_names.get(split), bool(self.split_names)
            name = _labels_beside(images or _of_images(self._shapes)[0], self._shapes, is_split)
            labels = _read_bounded(content, name, max(limit, 16 * n + 1024))
            if labels.dtype.kind not in "iu" or labels.shape not in ((n,), (n, 1)):
                expected = f"{n} whole numbers, one for each image"
                raise ValueError(f"{name} must be {expected}, not {labels.dtype} {labels.shape}")
            if labels.min() < 0:
                says = "classes are numbered from 0"
                raise ValueError(f"{name} has the label {labels.min()}; {says}")
            with about(name):
                return Classes(labels.reshape(n))


def read_array(key: str, path: Path, channels: int) -> dict[str, Picture]:
    """The images of an .npy or .npz, the value of `key`, by the file's name and their number.

    They are uint8 (n, H, W, C), of grey images (n, H, W), or one (H, W, C) or (H, W), with as many
    `channels` unless that is 0; in bool arrays True is white. Of an .npz they are `samples`, or the
    only array of images, or the only array. Raises ValueError where there are no such images.
    """
    with _opened(path, f"{key}={path} cannot be read") as content:
        if isinstance(content, StoredArray):
            images = content.whole()
        else:
            shapes = _shapes(content)
            names = [name for name in shapes if name == "samples"]
            names = names or _of_images(shapes) or [*shapes]
            if len(names) != 1:
                raise ValueError(f"it needs one array, or samples; it has {_in_words(shapes)}")
            images = _read_bounded(content, names[0], MAX_FILE_BYTES)
    if images.dtype == bool:
        images = 255 * images.astype(np.uint8)
    if images.ndim == 2 or images.ndim == 3 and images.shape[2] in (1, 2, 3, 4, channels):
        images = images[None]
    check(f"{key}={path}", images.shape, images.dtype, channels)
    images = images if images.ndim == 4 else images[..., None]
    if len(images) == 1:
        return {path.name: np.array(images[0])}
    return {f"{path.name}:{i}": np.array(image) for i, image in enumerate(images)}


def check(where: str, shape: Shape, dtype: np.dtype, channels: int, says: str = "") -> None:
    """Raise ValueError unless an array is uint8 images (n, H, W, C) or (n, H, W), and has any.

    The message begins with `where`, and says how to convert the array. `channels`, of which `says`
    tells whose value it is, are C or, where they do not matter, 0.
    """
    axes = shape if len(shape) == 4 else (*shape, 1)
    if dtype == np.uint8 and len(axes) == 4 and channels in (0, axes[3]):
        if 0 in shape:
            raise ValueError(f"{where} holds no images: its shape is {shape}")
        return
    remedy = ""
    if dtype.kind in "biuf" and dtype != np.uint8:
        remedy = f": save {CONVERSION}"
    elif len(shape) == 4 and channels == shape[1]:
        remedy = ": save x.transpose(0, 2, 3, 1)"
    elif len(shape) == 2:
        remedy = ": save x.reshape(n, H, W, C)"
    raise ValueError(
        f"{where} must hold uint8 images (n, H, W, {channels or 'C'}){says}, not {dtype} {shape}"
        f"{remedy}"
    )


def _prepared(image: NDArray, size: ImageSize) -> Picture:
    return to_size(cropped_then_resized, size)(np.atleast_3d(image))


@contextlib.contextmanager
def _opened(path: Path, message: str) -> Iterator[StoredArray | zipfile.ZipFile]:
    """The content of the file; an error in reading it becomes one that begins with `message`."""
    try:
        with open_regular(path) as file:
            if file.read(len(MAGIC)) == MAGIC:
                yield StoredArray.open(path)
            else:
                with zipfile.ZipFile(file) as archive:
                    yield archive
    except OSError:
        raise
    except Exception as error:  # a damaged file makes numpy fail in any way
        raise ValueError(f"{message}: {one_line(error)}") from error


def _shapes(archive: zipfile.ZipFile) -> dict[str, Shape]:
    """The shapes of the arrays in an .npz by their names; of the arrays only headers are read."""
    shapes = {}
    for entry in archive.namelist():
        name = entry.removesuffix(".npy")
        if name != entry:
            with about(name), open_entry(archive, entry) as file:
                shapes[name] = Header.read(file)[0].shape
    return shapes


def _in_words(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"


def _of_images(shapes: Mapping[str, Shape]) -> list[str]:
    """Names of the arrays of three axes or more that are not called labels."""
    return [
        name
        for name, shape in shapes.items()
        if len(shape) > 2 and not _IS_LABELS.fullmatch(bare(name))
    ]


def _labels_beside(images: str, names: Iterable[str], is_split: bool) -> str:
    """Name of the array with the labels of the array `images`; ValueError where there is none.

    A name is that of the images, or of their split, with a word of `LABELS`: train_images has
    train_labels, x_train has y_train. Of images that are no split it may be the word alone, or
    arr_1 beside arr_0, which are arrays that were saved without names.
    """
    stems = [bare(images), _AROUND.sub("", bare(images))] + [""] * (not is_split)
    forms = [form for stem in stems for word in LABELS for form in (stem + word, word + stem)]
    forms += ["arr1"] * (bare(images) == "arr0")
    by_form = {bare(name): name for name in names}
    if name := next((by_form[form] for form in forms if form in by_form), None):
        return name
    expected = f"{images}_labels" if is_split else "labels"
    raise ValueError(f"there is no array {expected}; it has {', '.join(names)}")


def _read_bounded(archive: zipfile.ZipFile, name: str, limit: int) -> NDArray:
    size = archive.getinfo(f"{name}.npy").file_size
    if size > limit:
        beyond = f"more than data.resident_bytes={limit:,}; an .npy is read from disk"
        raise ValueError(f"{name} unpacks to {size:,} bytes, {beyond}")
    return read_entry_array(archive, name)
