"""Images or other arrays, and class labels, in an .npy or .npz file."""

import contextlib
import functools
import re
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from configs.schema import Key, OneOf
from sources import digests, listing, splits
from sources.base import Classes, Picture, View
from sources.dtypes import DTYPES, name_of
from sources.files import MAX_FILE_BYTES
from sources.images import cropped_then_resized, sides_of, to_size
from sources.npy import MAGIC, Header, StoredArray
from sources.rules import Rules
from sources.splits import bare, held_out
from storage.files import about, one_line, open_entry, open_regular, plain, read_entry_array

# Words for class labels in the names of arrays: labels, train_labels, y_train.
LABELS = ("labels", "label", "targets", "target", "classes", "class", "y")
_IS_LABELS = re.compile(r"(labels?|targets?).*|.*(labels?|targets?)")
_AROUND = re.compile(rf"^(x|{splits.AROUND})|(x|{splits.AROUND})$")

KEYS = {
    "data.layout": Key(
        "nhwc",
        OneOf(("nhwc", "nchw", "nlc", "ncl")),
        "order of the axes of an .npy or .npz: images (n, H, W, C) or (n, C, H, W), signals "
        "(n, L, C) or (n, C, L); without C: grey images (n, H, W), signals (n, L) of one channel",
    ),
}

# Python for the reader of a message, whose array is x.
CONVERSION = (
    "(255 * (x.astype(float) - low) / (high - low)).clip(0, 255).round().astype('uint8') "
    "with its values low and high for black and white"
)

Shape = tuple[int, ...]


def to_image(row: NDArray, layout: str) -> NDArray:
    """A row of an array whose axes `data.layout` names, as (H, W, C); signals have height 1."""
    if row.ndim == 3:
        return row.transpose(1, 2, 0) if layout == "nchw" else row
    if row.ndim == 2 and layout in ("nlc", "ncl"):
        return row[None] if layout == "nlc" else row.T[None]
    return row[..., None] if row.ndim == 2 else row[None, :, None]


def image_shape(shape: Shape, layout: str) -> Shape:
    """(H, W, C) of each of the n rows of an array of `shape` (n, ...); () where it has none."""
    if not 2 <= len(shape) <= 4 or len(shape) == 4 and layout in ("nlc", "ncl"):
        return ()
    return to_image(np.broadcast_to(np.uint8(0), shape[1:]), layout).shape


def is_array(path: Path) -> bool:
    """True if the name is that of an .npy or .npz."""
    return path.suffix.lower() in (".npy", ".npz")


def shapes(path: Path) -> dict[str, Shape]:
    """Shapes of the arrays in an .npz by their names; {} of an .npy. No array is read."""
    with _opened(path, f"{path} cannot be read") as content:
        headers = {} if isinstance(content, StoredArray) else _headers(content)
        return {name: header.shape for name, header in headers.items()}


class Arrays:
    """The images of the .npy or .npz at `data.path`, for either split.

    Attributes:
        split_names: names of the arrays that hold the splits; {} where there is one array.
        by_name: False, since arrays have no names by which they could be held out.
    """

    by_name = False

    def __init__(self, path: Path, rules: Rules, key: str = "data.path"):
        self.path, self._rules = path, rules
        self._where = f"{key}={path}"
        self._unpacked = weakref.WeakValueDictionary()  # an array of both splits is held once

    @functools.cached_property
    def _headers(self) -> dict[str, Header]:
        """Headers of the arrays in an .npz by their names; {} of an .npy."""
        with _opened(self.path, f"{self._where} cannot be read") as content:
            return {} if isinstance(content, StoredArray) else _headers(content)

    @functools.cached_property
    def split_names(self) -> dict[str, str]:
        # x_train and x_test, too
        names = {re.sub("(?i)^x_?|_?x$", "", name): name for name in _of_images(self._headers)}
        return {split: names[name] for split, name in self._rules.find_splits(names).items()}

    @property
    def omitted(self) -> str:
        """Text on the arrays beside the splits."""
        names = _of_images(self._headers)
        return listing.in_words(listing.beside_splits("array", names, self.split_names))

    def dtype(self) -> str:
        """The `data.dtype` of the training split: "" where it holds images of 8 bits."""
        with _opened(self.path, f"{self._where} cannot be read") as content:
            is_packed = isinstance(content, zipfile.ZipFile)
            dtype = (self._headers[self._name("train")] if is_packed else content).dtype
        return name if dtype.kind in "biuf" and (name := name_of(dtype)) in DTYPES else ""

    def open(self, data: ConfigDict, split: str) -> View:
        """The images of `split`; ValueError where the array does not hold images."""
        where, layout = self._where, data.layout
        with _opened(self.path, f"{where} cannot be read") as content:
            is_packed = isinstance(content, zipfile.ZipFile)
            images = self._unpack(content, split, data.resident_bytes) if is_packed else content
        shape, says = images.shape, ", as data.num_channels says" if data.num_channels else ""
        of_train = data.dtype or (split == "test" and (self.dtype() or "uint8"))
        types = (of_train,) if of_train else ("uint8", *DTYPES)
        check(where, shape, images.dtype, data.num_channels, says, layout, types)
        _check_axes(where, shape, data)
        sides, size = image_shape(shape, layout)[:2], data.image_size
        is_resized = images.dtype == np.uint8 and not _are_signals(shape, layout)
        if size and not is_resized and sides_of(size) != sides:
            height, width = sides
            raise ValueError(
                f"{where} holds {images.dtype} arrays of {height} x {width}, which are not resized "
                f"as images are: set data.image_size=0, as the data have, not {size}"
            )
        if not is_packed and images.is_fortran and images.nbytes <= data.resident_bytes:
            images = images.whole()  # the bytes of an image lie apart, and take long to read
        n = shape[0]
        return View(
            source=Rows(images, layout, self.path.name),
            prepare=to_size(cropped_then_resized, size if is_resized else 0),
            index=np.arange(n)
            if self.split_names
            else held_out(n, split, data.held_out, data.groups),
            classes_of_all=partial(self._classes, split, n, data.resident_bytes),
            digest_of=partial(digests.of_zip, self.path) if is_packed else None,
        )

    def _name(self, split: str) -> str:
        """The name of the array of `split` in an .npz."""
        names = _of_images(self._headers)
        if not self.split_names and len(names) != 1:
            needs = "it needs one array of images, or train and test"
            raise ValueError(f"{needs}; it has {_in_words(self._headers)}")
        return self.split_names.get(split, names[0])

    def _unpack(self, archive: zipfile.ZipFile, split: str, limit: int) -> NDArray:
        name = self._name(split)
        if (images := self._unpacked.get(name)) is None:
            images = self._unpacked[name] = _read_bounded(archive, name, limit)
        return images

    def _classes(self, split: str, n: int, limit: int) -> Classes:
        """The classes of the `n` images of the array of `split`."""
        with _opened(self.path, f"{self._where} gives no class labels") as content:
            if isinstance(content, StoredArray):
                raise ValueError("an .npy has none; put images and labels in an .npz")
            images, is_split = self.split_names.get(split), bool(self.split_names)
            try:
                name = _labels_beside(
                    images or _of_images(self._headers)[0], self._headers, is_split
                )
            except ValueError:
                if is_split and split == "test":  # training needs none there
                    return Classes(np.full(n, -1))
                raise
            labels = _read_bounded(content, name, max(limit, 16 * n + 1024))
            if labels.dtype.kind not in "iu" or labels.shape not in ((n,), (n, 1)):
                expected = f"{n} whole numbers, one for each image"
                raise ValueError(f"{name} must be {expected}, not {labels.dtype} {labels.shape}")
            if labels.min() < 0:
                says = "classes are numbered from 0"
                raise ValueError(f"{name} has the label {labels.min()}; {says}")
            with about(name):
                return Classes(labels.reshape(n))


@dataclass(frozen=True)
class Rows:
    """The rows of an array, called `name` in errors, as images (H, W, C).

    A row of floats raises ValueError where it holds nan or an infinity.
    """

    array: StoredArray | NDArray
    layout: str
    name: str

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> NDArray:
        row = self.array[i]
        if row.dtype.kind == "f":
            check_finite(row, self.name, i)
        return to_image(row, self.layout)

    def digest(self) -> str:
        """The digest of the array alone."""
        return digests.of_source(self.array)


def check_finite(array: NDArray, name: str, *row: int) -> None:
    """Raise ValueError, with the index, where `array`, a `row` of `name`, is not finite."""
    if not np.isfinite(array).all():
        index = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise ValueError(f"{name}{[*row, *index]} is {array[index]}: replace what is not finite")


def read_array(key: str, path: Path, channels: int) -> dict[str, Picture]:
    """The images of an .npy or .npz, the value of `key`, by the file's name and their number.

    They are uint8 (n, H, W, C), of grey images (n, H, W), or one (H, W, C) or (H, W), with as many
    `channels` unless that is 0; in bool arrays True is white. Of an .npz they are `samples`, or the
    only array of images, or the only array. Raises ValueError where there are no such images.
    """
    images = _read_only(key, path)
    if images.dtype == bool:
        images = 255 * images.astype(np.uint8)
    if images.ndim == 2 or images.ndim == 3 and images.shape[2] in (1, 2, 3, 4, channels):
        images = images[None]
    check(f"{key}={path}", images.shape, images.dtype, channels)
    images = images if images.ndim == 4 else images[..., None]
    return _by_number(path, images)


def read_numbers(key: str, path: Path, shape: Shape, layout: str) -> dict[str, NDArray]:
    """Arrays (H, W, C) in units of their own, of an .npy or .npz; see `read_array`.

    The file has one or several, in the `layout` of the data; each has the `shape` (H, W, C). Raises
    ValueError where they have another, are no numbers, or are not finite.
    """
    if not (path.is_file() and is_array(path)):
        raise ValueError(f"{key}={path}: arrays are given as an .npy or .npz")
    array, where = _read_only(key, path), f"{key}={path}"
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where} must hold numbers, not {array.dtype}")
    is_one = array.ndim in (1, 2, 3) and to_image(array, layout).shape == shape
    rows = array[None] if is_one else array
    if not len(rows) or image_shape(rows.shape, layout) != shape:
        raise ValueError(
            f"{where} must hold arrays of the shape {shape} (H, W, C), one or several in the "
            f"layout {layout!r} of the data (data.layout), not {array.shape}"
        )
    check_finite(array, f"{where}: {path.name}")
    return _by_number(path, np.stack([to_image(row, layout) for row in rows]))


def _read_only(key: str, path: Path) -> NDArray:
    """The array of an .npy, or the one of an .npz that holds images."""
    with _opened(path, f"{key}={path} cannot be read") as content:
        if isinstance(content, StoredArray):
            return plain(content.whole())
        headers = _headers(content)
        names = [name for name in headers if name == "samples"]
        names = names or _of_images(headers) or [*headers]
        if len(names) != 1:
            raise ValueError(f"it needs one array, or samples; it has {_in_words(headers)}")
        return _read_bounded(content, names[0], MAX_FILE_BYTES)


def _by_number(path: Path, images: NDArray) -> dict[str, NDArray]:
    """`images` by the name of their file and their number."""
    if len(images) == 1:
        return {path.name: np.array(images[0])}
    return {f"{path.name}:{i}": np.array(image) for i, image in enumerate(images)}


def check(
    where: str,
    shape: Shape,
    dtype: np.dtype,
    channels: int,
    says: str = "",
    layout: str = "nhwc",
    types: Sequence[str] = ("uint8",),
) -> None:
    """Raise ValueError unless an array holds images, (n, H, W, C) or as `layout` says, and has any.

    The message begins with `where`, and says how to convert the array. `channels`, of which `says`
    tells whose value it is, are C or, where they do not matter, 0; `types` are names of dtypes.
    """
    image = image_shape(shape, layout)
    is_number = dtype.kind in "biuf"
    if is_number and name_of(dtype) in types and image and channels in (0, image[2]):
        if 0 in shape:
            raise ValueError(f"{where} holds no images: its shape is {shape}")
        return
    remedy = ""
    if is_number and types == ("uint8",) and dtype != np.uint8:
        remedy = f": save {CONVERSION}"
    elif len(shape) == 4 and channels == shape[1]:
        remedy = ": save x.transpose(0, 2, 3, 1)" + ", or set data.layout='nchw'" * bool(says)
    elif len(shape) == 2:
        remedy = ": save x.reshape(n, H, W, C)"
    is_any = len(types) > 1 and dtype != np.uint8
    content = "images or other arrays of numbers" if is_any else f"{types[0]} images"
    axes = "(n, L, C)" if _are_signals(shape, layout) else f"(n, H, W, {channels or 'C'})"
    raise ValueError(f"{where} must hold {content} {axes}{says}, not {dtype} {shape}{remedy}")


def _check_axes(where: str, shape: Shape, data: ConfigDict) -> None:
    """Raise ValueError for an array whose axes seem to be in another order than stated."""
    if data.layout != "nhwc":
        return
    if len(shape) == 3 and shape[2] < 5 <= min(shape[:2]):
        raise ValueError(
            f"{where} is {shape}, which looks like one image (H, W, C): data are several, "
            "(n, H, W, C); such narrow grey images (n, H, W) are given as x[..., None], signals "
            "(n, L, C) with data.layout='nlc'"
        )
    if not data.num_channels and len(shape) == 4 and shape[1] < 5 <= min(shape[2:]):
        raise ValueError(
            f"{where} is {shape}, which looks like (n, C, H, W): "
            "transpose it to (n, H, W, C), set data.layout='nchw', or say "
            f"data.num_channels={shape[3]} if the channels are last"
        )


def _are_signals(shape: Shape, layout: str) -> bool:
    return len(shape) == 2 or len(shape) == 3 and layout in ("nlc", "ncl")


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


def _headers(archive: zipfile.ZipFile) -> dict[str, Header]:
    """The headers of the arrays in an .npz by their names; nothing else of them is read."""
    headers = {}
    for entry in archive.namelist():
        name = entry.removesuffix(".npy")
        if name != entry:
            with about(name), open_entry(archive, entry) as file:
                headers[name] = Header.read(file)[0]
    return headers


def _in_words(headers: Mapping[str, Header]) -> str:
    return ", ".join(f"{name} {header.shape}" for name, header in headers.items()) or "none"


def _of_images(headers: Mapping[str, Header]) -> list[str]:
    """Names of the arrays of three axes or more that are not called labels; else those of two."""
    others = {n: header for n, header in headers.items() if not _IS_LABELS.fullmatch(bare(n))}
    images = [name for name, header in others.items() if len(header.shape) > 2]
    signals = [n for n, h in others.items() if len(h.shape) == 2 and h.shape[1] > 1]
    return images or signals


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
