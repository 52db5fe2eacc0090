"""What lies on disk: sources of images with random access, and how published work crops them.

A source is a sequence: `len(source)` images, of which `source[i]` reads one as uint8 (H, W, C) or
raises `Unreadable` with its name. A numpy array (n, H, W, C) is one. Sources can be pickled, and a
process opens the files it needs by itself, because the position in an open file is shared with
forked processes.
"""

import io
import os
import posixpath
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sources import tfrecords

Picture = NDArray[np.uint8]  # (H, W, C)
Filter = Image.Resampling

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_FILE_BYTES = 2**28  # of one image, as it is read or unpacked; Pillow bounds the pixels


class Unreadable(ValueError):
    """An image that is damaged, missing or larger than it may be."""


class Source(Protocol):
    """See the module."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Picture: ...


class PerProcess:
    """What `open()` returns, once in each process: an open file does not survive a fork.

    Forked processes share the position in it, and have none of the threads of its reader. What
    the parent opened is kept, because closing it needs these threads.
    """

    def __init__(self, open: Callable):
        self._open = open
        self._opened = {}

    def __call__(self):
        process = os.getpid()
        if process not in self._opened:
            self._opened[process] = self._open()
        return self._opened[process]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}


@dataclass(frozen=True)
class View:
    """The images `index` of a source, each of them as `prepare` makes it."""

    source: Source
    prepare: Callable[[Picture], Picture]
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Picture:
        return self.prepare(self.source[int(self.index[i])])


def held_out(n: int, split: str) -> NDArray[np.int64]:
    """Indices of `split` where nobody has split n images: "test" is a fixed random tenth.

    Raises:
        ValueError: there are fewer than two images.
    """
    if n < 2:
        raise ValueError(f"{n} image(s) cannot be split into data to train and to test on")
    order = np.random.RandomState(0).permutation(n)
    tenth = max(1, round(n / 10))
    return order[tenth:] if split == "train" else order[:tenth]


# --- how images are cut and resized ---------------------------------------------------------------


def resize(image: Picture, height: int, width: int, kernel: Filter = Filter.BILINEAR) -> Picture:
    """`image` at (height, width); the kernel widens as the image shrinks, against aliasing."""
    if image.shape[:2] == (height, width):
        return image
    squeezed = image[..., 0] if image.shape[2] == 1 else image
    resized = np.asarray(Image.fromarray(squeezed).resize((width, height), kernel))
    return resized.reshape(height, width, image.shape[2])


def center_crop(image: Picture, size: int) -> Picture:
    """The central square of side `size`; of a side that is shorter, all."""
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[max(top, 0) :, max(left, 0) :][:size, :size]


def resized_whole(image: Picture, size: int) -> Picture:
    """All of the image, at (size, size)."""
    return resize(image, size, size)


def cropped_then_resized(image: Picture, size: int) -> Picture:
    """The largest central square, at (size, size) by a bicubic kernel."""
    return resize(center_crop(image, min(image.shape[:2])), size, size, Filter.BICUBIC)


def resized_then_cropped(image: Picture, size: int) -> Picture:
    """The image with its shorter side at `size`, of it the central square."""
    ratio = size / min(image.shape[:2])
    return center_crop(resize(image, *(round(side * ratio) for side in image.shape[:2])), size)


def face(image: Picture, size: int) -> Picture:
    """The central 140 x 140 of a CelebA image, at (size, size)."""
    return resize(center_crop(image, 140), size, size)


def unchanged(image: Picture) -> Picture:
    return image


# --- images in files ------------------------------------------------------------------------------


def decode_image(data: bytes, channels: int) -> Picture:
    """A PNG, JPEG or WebP file as grey (`channels` 1) or RGB (3) pixels, upright as EXIF says.

    What is transparent becomes white; 16 bits a channel become 8.

    Raises:
        Exception: anything, where the data are damaged or hold more pixels than Pillow allows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        except UnidentifiedImageError as error:
            raise ValueError("no PNG, JPEG or WebP file") from error
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


@dataclass(frozen=True)
class Files:
    """Encoded images by name; `read` gives the bytes of one."""

    where: Path
    names: list[str]
    read: Callable[[str], bytes]
    channels: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Picture:
        try:
            return decode_image(self.read(self.names[i]), self.channels)
        except Exception as error:  # a damaged file makes the decoder fail in any way
            raise Unreadable(f"{self.where}/{self.names[i]}: {_reason(error)}") from error


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of a regular file below `folder`."""
    path = folder / name
    if not path.is_file():  # a pipe or a device could be read for ever
        raise ValueError("not a file")
    with open(path, "rb") as file:
        return _bounded(file)


def _bounded(file: BinaryIO) -> bytes:
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return data


def read_entry(archive: PerProcess, name: str) -> bytes:
    """The bytes of an entry of a zip file, unpacked in memory; nothing is extracted to disk."""
    with archive().open(name) as entry:
        return _bounded(entry)


def folder(data, split: str) -> Source:
    """The user's own images at `data.path`: a folder or zip of image files, an .npy or an .npz.

    Files of all sub-folders count, in the order of their names; links to files are followed, links
    to folders are not. Where there are sub-folders `train` and `test` (in an .npz, arrays of these
    names) they are the splits, else a fixed random tenth is held out to test on.

    Args:
        data: reads `path`, `num_channels`, `image_size` and `resident_bytes`.

    Raises:
        ValueError, OSError: there is nothing to read, or not what it should be.
    """
    path = Path(data.path).expanduser()
    if not data.path:
        raise ValueError(
            "data.dataset='folder' needs data.path, a folder or .zip of images, .npy or .npz"
        )
    if not path.exists():
        raise FileNotFoundError(f"data.path={data.path} does not exist")
    if path.suffix.lower() in (".npy", ".npz"):
        images, index = _array(path, split, data.num_channels, data.resident_bytes)
    else:
        if data.num_channels not in (1, 3):
            raise ValueError(f"data.num_channels must be 1 or 3, not {data.num_channels}")
        names, read = _zip_entries(path) if path.is_file() else _tree(path)
        if not names:
            raise ValueError(f"data.path={data.path} holds no images ({', '.join(SUFFIXES)})")
        names, index = _names_of_split(names, split)
        images = Files(path, names, read, data.num_channels)
    return View(images, partial(cropped_then_resized, size=data.image_size), index)


def _tree(root: Path) -> tuple[list[str], Callable[[str], bytes]]:
    names = []
    for folder, _, files in os.walk(root, onerror=_raise):
        below = Path(folder).relative_to(root)
        names += [(below / file).as_posix() for file in files if _is_image(file)]
    return sorted(names), partial(read_file, root)


def _raise(error: OSError) -> None:
    raise error


def _zip_entries(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    archive = PerProcess(partial(zipfile.ZipFile, path))
    try:
        names = archive().namelist()
    except Exception as error:  # a damaged directory makes it fail in any way
        raise ValueError(
            f"data.path={path} is no folder, .npy, .npz or zip file: {_reason(error)}"
        ) from error
    images = {name for name in names if _is_image(posixpath.basename(name))}
    return sorted(images), partial(read_entry, archive)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")  # "._x" is macOS's own


def _names_of_split(names: list[str], split: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names, and which of them belong to `split`; one folder may hold all the others."""
    parts = [name.split("/", 2) for name in names]
    level = 1 if len({part[0] for part in parts}) == 1 else 0
    tops = np.array(["".join(part[level : level + 1]) for part in parts])
    if {"train", "test"} <= set(tops):
        return names, np.flatnonzero(tops == split)
    return names, held_out(len(names), split)


@dataclass(frozen=True)
class Array:
    """The images of an .npy, which stays on disk."""

    file: PerProcess

    def __len__(self) -> int:
        return len(self.file())

    def __getitem__(self, i: int) -> Picture:
        return self.file()[i]


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
        raise ValueError(f"data.path={path} cannot be read: {_reason(error)}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != channels:
        raise ValueError(
            f"data.path={path} must hold uint8 images (n, H, W, {channels}), as data.num_channels "
            f"says, not {images.dtype} {images.shape}"
        )
    if not images.size:
        raise ValueError(f"data.path={path} holds no images: its shape is {images.shape}")
    index = np.arange(len(images)) if given else held_out(len(images), split)
    return Array(mapped) if isinstance(images, np.memmap) else images, index


def _unpacked(file, split: str, limit: int) -> tuple[NDArray, bool]:
    """The array of `split` in an .npz, or its only array; and whether the file gives the splits."""
    given = {"train", "test"} <= set(file.files)
    if not given and len(file.files) != 1:
        raise ValueError(f"it needs one array, or train and test; it has {file.files}")
    name = split if given else file.files[0]
    size = file.zip.getinfo(f"{name}.npy").file_size
    if size > limit:
        raise ValueError(
            f"{name} unpacks to {size:,} bytes, more than data.resident_bytes={limit:,}; "
            "an .npy is read from disk"
        )
    return file[name], given


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- images in TFRecords --------------------------------------------------------------------------


class TFRecords:
    """Records of TFRecord files, found once; `parse` makes a picture of the data of one.

    Raises:
        ValueError: a file ends within a record, or a length is damaged; the file is named.
    """

    def __init__(self, paths: list[Path], parse: Callable[[bytes], Picture]):
        self.paths, self.parse = paths, parse
        indices = [tfrecords.record_index(path) for path in paths]
        self.file = np.repeat(np.arange(len(paths)), [len(index) for index in indices])
        self.start, self.size = np.concatenate(indices).T

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i: int) -> Picture:
        path = self.paths[self.file[i]]
        try:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), self.size[i] + 4, self.start[i])
            return self.parse(tfrecords.checked(data))
        except Exception as error:  # a damaged record makes the parser fail in any way
            raise Unreadable(
                f"{path}, record at byte {self.start[i] - 12}: {_reason(error)}"
            ) from error


def stylegan_image(data: bytes) -> Picture:
    """An image of StyleGAN's TFRecords: `shape`, and `data` as (C, H, W)."""
    features = tfrecords.parse_example(data)
    shape = tfrecords.int_feature(features["shape"])
    pixels = np.frombuffer(tfrecords.bytes_feature(features["data"]), np.uint8)
    return pixels.reshape(shape).transpose(1, 2, 0)


def encoded_image(data: bytes, channels: int) -> Picture:
    """An image of tensorflow_datasets' TFRecords: a PNG or JPEG file in `image`."""
    image = tfrecords.bytes_feature(tfrecords.parse_example(data)["image"])
    return decode_image(bytes(image), channels)


def faces_of_stylegan(data, split: str) -> Source:
    """CelebA-HQ or FFHQ from the TFRecord file `data.tfrecords_path`; a tenth of it is the test."""
    path = Path(data.get("tfrecords_path", ""))
    if not path.is_file():
        raise FileNotFoundError(
            f"data.tfrecords_path={path} does not exist; name the -r08 (256 x 256) or -r10 (1024 x "
            f"1024) file that StyleGAN's dataset_tool.py makes of {data.dataset}"
        )
    records = TFRecords([path], stylegan_image)
    return View(records, unchanged, held_out(len(records), split))


# --- tensorflow_datasets --------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A split of a data set that tensorflow_datasets prepared for random access."""

    where: str
    images: PerProcess

    def __len__(self) -> int:
        return len(self.images())

    def __getitem__(self, i: int) -> Picture:
        images = self.images()
        try:
            return images[i]["image"]
        except Exception as error:  # a damaged record makes the decoder fail in any way
            raise Unreadable(f"{self.where}, image {i}: {_reason(error)}") from error


def prepared(
    data,
    split: str,
    name: str,
    prepare: Callable[[Picture, int], Picture],
    splits: dict[str, str],
) -> Source:
    """A data set of tensorflow_datasets, which has to be on disk: nothing is downloaded.

    It may have been prepared for random access (ArrayRecord), or as TFRecords, the default.

    Args:
        data: reads `data_dir`, `image_size` and `num_channels`.
        split: "train" or "test".
        name: what tensorflow_datasets calls it.
        prepare: makes an image of side `image_size` of a stored one.
        splits: what it calls the splits.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
        ValueError: tensorflow_datasets is not installed.
    """
    builder = _builder(name, data.data_dir)
    stored = splits[split]
    if builder.info.file_format.value == "tfrecord" and stored in builder.info.splits:
        paths = [Path(path) for path in builder.info.splits[stored].filepaths]
        source = TFRecords(paths, partial(encoded_image, channels=data.num_channels))
    else:
        source = Prepared(
            f"{name} ({stored})", PerProcess(partial(_open_prepared, name, stored, data.data_dir))
        )
    try:
        index = np.arange(len(source))
    except (NotImplementedError, OSError, LookupError) as error:
        root = str(builder.data_path).removesuffix(f"/{name}/{builder.version}")
        raise FileNotFoundError(
            f"{name} is not in {builder.data_path}. Where there is a network, run: python3 -c "
            f"\"import tensorflow_datasets as tfds; tfds.data_source('{name}', data_dir='{root}')\""
            " and copy the folder here, or name another folder as data.data_dir"
        ) from error
    return View(source, partial(prepare, size=data.image_size), index)


def _open_prepared(name: str, split: str, data_dir: str):
    return _builder(name, data_dir).as_data_source(split)


def _builder(name: str, data_dir: str):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"{name} is read by tensorflow_datasets: pip install -r requirements.txt ({error})"
        ) from error
    return tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)


def lsun(data, split: str) -> Source:
    """The LSUN category `data.category`, cut as published for its size."""
    category = data.get("category", "")
    if category not in ("bedroom", "church_outdoor"):
        raise ValueError(f"data.category={category!r}; known: bedroom, church_outdoor")
    prepare = resized_then_cropped if data.image_size == 128 else cropped_then_resized
    return prepared(data, split, f"lsun/{category}", prepare, VALIDATED)


def digits(data, split: str) -> Source:
    """scikit-learn's 1,797 scanned digits, 8 x 8 grey: 1,617 to train, 180 to test on."""
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    return View(images, unchanged, held_out(len(images), split))


TESTED = {"train": "train", "test": "test"}
VALIDATED = {"train": "train", "test": "validation"}

# name of `data.dataset` in lower case: (data's config, split) -> images of one size
SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "folder": folder,
    "cifar10": partial(prepared, name="cifar10", prepare=resized_whole, splits=TESTED),
    "svhn": partial(prepared, name="svhn_cropped", prepare=resized_whole, splits=TESTED),
    "celeba": partial(prepared, name="celeb_a", prepare=face, splits=VALIDATED),
    "lsun": lsun,
    **dict.fromkeys(("celebahq", "celebahq_256", "ffhq", "ffhq_256"), faces_of_stylegan),
}
