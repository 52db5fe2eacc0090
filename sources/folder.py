"""The user's own images: a folder or zip of image files, an .npy or an .npz."""

import functools
import logging
import os
import re
import weakref
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from configs.schema import Key, Number, Numbers, Text, whole
from sources import before, digests, labels, listing, splits
from sources.base import Classes, PerProcess, Picture, Source, Unreadable, View, held_out
from sources.images import cropped_then_resized, decode_image, extent_of_16_bits, open_image
from sources.listing import LeftOut, Listed
from sources.sixteen_bits import Measured, Range, may_have_16_bits, measure
from sources.sizes import HEADER_BYTES, Size, size_in_header
from storage.files import one_line, open_entry, read_entry_array

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FILE_BYTES = 2**28  # of one image, as it is read or unpacked; Pillow bounds the pixels
KEYS = {  # for image files of data, and of other keys such as sampling.encode
    "data.scale": Key(
        (),
        Numbers(Number(-1e9, 1e9), (0, 2), rising=True),
        "of 16-bit image files: the values (low, high) that become black and white; (): measured, "
        "(0, 2^b - 1) for the b bits of the largest value",
    ),
}

LABELS = "labels"  # of an .npz: the array, or the end of its name


@dataclass(frozen=True)
class Rules:
    """Rules on which files of a folder or zip are data, their splits and classes: `data.rules`.

    A run keeps the rules that it began with, since others would change its data.
    """

    suffixes: Sequence[str]
    list_folder: Callable[[Path], Listed]
    list_names: Callable[[Iterable[str]], Listed]  # of a zip
    clean: Callable[[str], str]  # the name of an image from its path in a `dataset.json`
    given_splits: Callable[[Iterable[str]], dict[str, str]]
    held_out: Callable[[Sequence[str], str], NDArray[np.int64]]
    class_order: Callable[[str], Any]


NEWEST = 2
RULES = {
    1: Rules(
        before.SUFFIXES,
        before.list_folder,
        before.list_names,
        str,
        before.given_splits,
        before.held_out_by_number,
        str,
    ),
    2: Rules(
        listing.SUFFIXES,
        listing.list_folder,
        listing.list_names,
        listing.clean,
        splits.given_splits,
        splits.held_out_by_name,
        labels.natural,
    ),
}


def open_folder(data, split: str) -> Source:
    """The images at `data.path`: files of a folder or a zip, or arrays of an .npy or an .npz.

    `sources.listing` says which files count, in the order of their names, and `sources.splits`
    which folders on top, or arrays of an .npz, are the splits; without them about a tenth of the
    files, or a random tenth of an array, is held out to test on. `data.rules` may name older rules
    (`sources.before`). Where `data.num_channels` is 0, a file gives as many as it needs (see
    `decode_image`), an array those it has. Class labels are those of a `dataset.json`, else the
    folders below those of the splits (`sources.labels`); of an .npz the array `labels`, or
    `train_labels` and `test_labels`.
    Raises ValueError or OSError where there is nothing to read, or not what it should be.
    """
    path, rules = _path(data), _rules(data)
    if _is_array(path):
        images, index = _array(path, split, data.num_channels, data.resident_bytes, rules)
        digest = partial(digests.of_zip, path) if isinstance(images, np.ndarray) else None
        classes = partial(_array_classes, path, split, len(images), data.resident_bytes, rules)
    else:
        if data.num_channels not in (0, 1, 3):
            raise ValueError(f"data.num_channels must be 1 or 3, not {data.num_channels}")
        opened = _list(path, rules)
        names = [*opened.listed.files]
        tops = _tops(names)
        if folders := rules.given_splits(tops):
            index = np.flatnonzero([top.lower() == folders[split].lower() for top in tops])
            used = {name.lower() for name in folders.values()}
            in_split = [name for name, top in zip(names, tops, strict=True) if top.lower() in used]
        else:
            index, in_split = rules.held_out(names, split), names
            if unknown := splits.unknown_splits(tops):
                _warn_of_splits(path, *unknown)
        stored = [*opened.listed.files.values()]
        images = Files(path, stored, opened.open, data.num_channels).scaled(data.scale)
        classes = partial(_file_classes, path, opened, names, in_split, bool(folders), rules)
        metadata = opened.listed.metadata
        beside = [metadata[1]] if metadata and data.num_classes else []
        content = data.digest == "content"
        digest = partial(digests.of_files, path, opened.archive, stored, beside, content)
    prepare = partial(cropped_then_resized, size=data.image_size)
    return View(images, prepare, index, classes, digest)


open_folder.keys = {
    "data.path": Key("", Text(), "of 'folder': a folder or .zip of images, an .npy or .npz"),
    "data.rules": Key(
        0,
        whole(0, 2),
        "of 'folder': rules on which files are data, and how a tenth is held out; 1: the first "
        "ones, for old runs; 2: those of docs/architecture.md; 0: the newest, which a run keeps",
        before=1,
    ),
}


def measure_scale(data, watch: Callable[[Iterable[int]], Iterable[int]] = iter) -> Measured:
    """The `data.scale` of the image files at `data.path`; () where there are none.

    `watch` shows the progress. Raises ValueError and OSError as `open_folder`.
    """
    path = Path(data.path).expanduser()
    if not path.exists():
        return Measured(())
    opened = _list(path, _rules(data))
    return Files(path, [*opened.listed.files.values()], opened.open, 0).measured(watch)


def names_files(path: str) -> bool:
    """True if `data.path` is a folder or zip of image files, False for arrays."""
    return bool(path) and not _is_array(Path(path))


def account(data) -> tuple[dict[str, str], str]:
    """Folders or arrays that hold the splits of the images at `data.path`, {} without any.

    The second value is what is left out there, such as "30 .txt, 2 hidden folders (.git, .trash)".
    """
    path, rules = _path(data), _rules(data)
    if _is_array(path):
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        names = _image_arrays(getattr(content, "files", ()))  # of an .npz; an .npy has no names
        parts, omitted, kind = names, LeftOut(), "array{s}"
    else:
        listed = _list(path, rules).listed
        parts, omitted, kind = _tops([*listed.files]), listed.left_out, "image{s}"
    if split_names := rules.given_splits(parts):
        kind += " beside " + " and ".join(split_names.values())
        used = {name.lower() for name in split_names.values()}
        omitted = omitted + LeftOut((kind, part) for part in parts if part.lower() not in used)
    return split_names, listing.in_words(omitted)


@functools.cache  # once for each place
def _warn_of_splits(path: Path, *names: str) -> None:
    log.warning(
        f"data.path={path}: {' and '.join(names)} look like a split but are not known as one, "
        "so images of both are trained and tested on; folders 'train' and 'test' are a split"
    )


def _rules(data) -> Rules:
    return RULES[data.rules or NEWEST]


def _path(data) -> Path:
    if not data.path:
        kinds = "a folder or .zip of images, .npy or .npz"
        raise ValueError(f"data.dataset='folder' needs data.path, {kinds}")
    path = Path(data.path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data.path={data.path} does not exist")
    return path


def read_images(
    key: str, name: str, channels: int, scale: Range | tuple[()] = ()
) -> dict[str, Picture]:
    """The images of a file, a folder, a .zip or an array file by their names, in their order.

    `key` is the key with the value `name`; `channels` and `scale` are those of `decode_image`, but
    a scale of () is measured on all images. Files follow the same rules as data, and the log says
    which are left out. An .npy, or an .npz with one array or `samples`, holds images of any number
    of channels, uint8 (n, H, W, C) or one (H, W, C). Raises FileNotFoundError where `name` does not
    exist, ValueError where an image cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{key}={name} does not exist")
    if path.is_file() and _is_array(path):
        return _read_array(key, path, channels)
    if channels not in (0, 1, 3):
        says = f"an .npy or .npz, uint8 (n, H, W, {channels})"
        raise ValueError(f"{key}={name}: images of {channels} channels are given as {says}")
    if path.is_file() and listing.is_image(path.name):
        names, folder = {path.name: path.name}, path.parent
        opener = partial(open_below, folder)
    else:
        opened = _list(path, RULES[NEWEST], key)
        names, folder, opener = opened.listed.files, path, opened.open
        if words := listing.in_words(opened.listed.left_out):
            log.info(f"{key}={name}: left out: {words}")
    files = Files(folder, [*names.values()], opener, channels).scaled(scale)
    return {name: files[i] for i, name in enumerate(names)}


# --- image files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Image files by name, each opened by `open`; nothing is extracted to disk.

    `channels` and `scale` are those of `decode_image`.
    """

    where: Path
    names: list[str]
    open: Callable[[str], IO[bytes]]
    channels: int
    scale: Range | tuple[()] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Picture:
        return self._read(i, partial(decode_image, channels=self.channels, scale=self.scale))

    def _read(self, i: int, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(_read(self.open, self.names[i]))
        except Exception as error:  # a damaged file makes the decoder fail in any way
            raise Unreadable(f"{self.where}/{self.names[i]}: {one_line(error)}") from error

    def size(self, i: int) -> Size:
        """Stored height and width of image i; `Unreadable` where it cannot be read."""
        try:
            with self.open(self.names[i]) as file:
                return size_in_header(file.read(HEADER_BYTES))
        except Exception:  # a TIFF may have its header at the end
            return self[i].shape[:2]

    def scaled(self, scale: Range | tuple[()]) -> "Files":
        """The files with `scale`, or with the `measured` one where it is ()."""
        return replace(self, scale=tuple(scale) or self.measured().scale)

    def measured(self, watch: Callable[[Iterable[int]], Iterable[int]] = iter) -> Measured:
        """The scale of 16-bit images among them; see `sixteen_bits.measure`."""

        def has_16_bits(i: int) -> bool:
            try:
                with self.open(self.names[i]) as file:
                    return may_have_16_bits(open_image(file))
            except Exception:  # reported when its pixels are read
                return False

        def extent(i: int) -> tuple[int, int] | None:
            try:
                return self._read(i, extent_of_16_bits)
            except Unreadable:  # reported when its pixels are read
                return None

        try:
            return measure(len(self), has_16_bits, extent, watch)
        except ValueError as error:
            raise ValueError(f"the images of {self.where}: {error}") from error


def _read(open: Callable[[str], IO[bytes]], name: str) -> bytes:
    with open(name) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return data


def open_below(folder: Path, name: str) -> IO[bytes]:
    """A regular file below `folder`; ValueError where it is none."""
    path = folder / name
    if not path.is_file():  # a pipe or a device could be read for ever
        raise ValueError("not a file")
    return open(path, "rb")


def _open_in(archive: PerProcess, name: str) -> IO[bytes]:
    return open_entry(archive(), name)


class Opened(NamedTuple):
    """The image files of a folder or zip, and a function that opens one by its stored name.

    `archive` opens the zip file anew in each process; it is None for a folder.
    """

    listed: Listed
    open: Callable[[str], IO[bytes]]
    archive: PerProcess | None = None


def _list(path: Path, rules: Rules, key: str = "data.path") -> Opened:
    if path.is_file():
        archive = PerProcess(partial(zipfile.ZipFile, path))
        try:
            names = archive().namelist()
        except Exception as error:  # a damaged directory makes it fail in any way
            says = f"is no folder, .npy, .npz or zip file: {one_line(error)}"
            raise ValueError(f"{key}={path} {says}") from error
        opened = Opened(rules.list_names(names), partial(_open_in, archive), archive)
    else:
        opened = Opened(rules.list_folder(path), partial(open_below, path))
    if not opened.listed.files:
        words = listing.in_words(opened.listed.left_out)
        besides = f"; left out: {words}" if words else ""
        raise ValueError(f"{key}={path} holds no images ({', '.join(rules.suffixes)}){besides}")
    return opened


def _tops(names: list[str]) -> list[str]:
    """The top folder of each file, "" on top; the one below where a single folder holds all."""
    pieces = [name.split("/", 2) for name in names]
    level = 1 if len({p[0] for p in pieces}) == 1 else 0
    return [p[level] if len(p) > level + 1 else "" for p in pieces]


def _file_classes(
    path: Path,
    opened: Opened,
    names: list[str],
    in_split: list[str],
    below_split: bool,
    rules: Rules,
) -> Classes:
    """Classes of all files `names`; those `in_split` must have one."""
    if opened.listed.metadata:
        name, stored = opened.listed.metadata
        above = name.removesuffix(listing.METADATA)
        try:
            content = _read(opened.open, stored)
            classes = labels.of_metadata(names, content, lambda n: above + rules.clean(n))
        except Exception as error:  # a damaged file fails in any way
            where = f"data.path={path}: {name}"
            raise ValueError(f"{where} gives no class labels: {one_line(error)}") from error
    else:
        classes = labels.of_folders(names, in_split, below_split, rules.class_order)
    labels.check(f"data.path={path}", names, classes, in_split)
    return classes


# --- arrays ---------------------------------------------------------------------------------------


def _is_array(path: Path) -> bool:
    return path.suffix.lower() in (".npy", ".npz")


def _array(
    path: Path, split: str, channels: int, limit: int, rules: Rules
) -> tuple[Source, NDArray[np.int64]]:
    """The images of an .npy or .npz, and which of them belong to `split`."""
    mapped = PerProcess(partial(np.load, path, mmap_mode="r", allow_pickle=False))
    try:
        images, has_splits = mapped(), False
        if isinstance(images, np.lib.npyio.NpzFile):
            with images as file:
                images, has_splits = _unpacked(file, split, limit, rules)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes numpy fail in any way
        raise ValueError(f"data.path={path} cannot be read: {one_line(error)}") from error
    expected = f"{channels}), as data.num_channels says" if channels else "C)"
    if images.dtype != np.uint8 or images.ndim != 4 or channels not in (0, images.shape[3]):
        raise ValueError(
            f"data.path={path} must hold uint8 images (n, H, W, {expected}, not {images.dtype} "
            f"{images.shape}"
        )
    if not channels and images.shape[1] < 5 <= min(images.shape[2:]):
        raise ValueError(
            f"data.path={path} is {images.shape}, which looks like (n, C, H, W): transpose it to "
            f"(n, H, W, C), or say data.num_channels={images.shape[3]} if the channels are last"
        )
    if not images.size:
        raise ValueError(f"data.path={path} holds no images: its shape is {images.shape}")
    index = np.arange(len(images)) if has_splits else held_out(len(images), split)
    return mapped if isinstance(images, np.memmap) else images, index


def _image_arrays(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.lower().endswith(LABELS)]


_in_memory: weakref.WeakValueDictionary[tuple, NDArray] = weakref.WeakValueDictionary()


def _unpacked(file, split: str, limit: int, rules: Rules) -> tuple[NDArray, bool]:
    """The array of `split` in an .npz, or its only array; and whether the file gives the splits."""
    names = _image_arrays(file.files)
    by_split = rules.given_splits(names)
    if not by_split and len(names) != 1:
        raise ValueError(f"it needs one array, or train and test; it has {file.files}")
    name, stat = by_split.get(split, names[0]), os.fstat(file.zip.fp.fileno())
    key = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, name, limit
    if (images := _in_memory.get(key)) is None:  # both splits of one array hold one copy
        images = _in_memory[key] = _read_bounded(file, name, limit)
    return images, bool(by_split)


def _read_bounded(file, name: str, limit: int) -> NDArray:
    size = file.zip.getinfo(f"{name}.npy").file_size
    if size > limit:
        beyond = f"more than data.resident_bytes={limit:,}; an .npy is read from disk"
        raise ValueError(f"{name} unpacks to {size:,} bytes, {beyond}")
    return read_entry_array(file.zip, name)


def _read_array(key: str, path: Path, channels: int) -> dict[str, Picture]:
    """The images of an .npy or .npz, for `read_images`, by the file's name and their number."""
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            with content as file:
                name = "samples" if "samples" in file.files else file.files[0]
                if name != "samples" and len(file.files) > 1:
                    raise ValueError(f"it needs one array, or samples; it has {file.files}")
                content = _read_bounded(file, name, MAX_FILE_BYTES)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes numpy fail in any way
        raise ValueError(f"{key}={path} cannot be read: {one_line(error)}") from error
    images = content[None] if content.ndim == 3 else content
    if images.dtype != np.uint8 or images.ndim != 4 or channels not in (0, images.shape[3]):
        expected = f"uint8 images (n, H, W, {channels or 'C'})"
        raise ValueError(f"{key}={path} must hold {expected}, not {content.dtype} {content.shape}")
    if not images.size:
        raise ValueError(f"{key}={path} holds no images: its shape is {content.shape}")
    if len(images) == 1:
        return {path.name: np.array(images[0])}
    return {f"{path.name}:{i}": np.array(image) for i, image in enumerate(images)}


def _array_classes(path: Path, split: str, n: int, limit: int, rules: Rules) -> Classes:
    """The classes of the `n` images that the .npz at `path` gives for `split`."""
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError(f"an .npy has none; put images and {LABELS} in an .npz")
        with content as file:
            by_split = rules.given_splits(_image_arrays(file.files))
            name = f"{by_split[split]}_{LABELS}" if by_split else LABELS
            if by_split and name not in file.files:  # train_labels beside train_images
                name = re.sub("(_?images?)?$", f"_{LABELS}", by_split[split], count=1, flags=re.I)
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
