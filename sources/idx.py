"""MNIST's files, idx: arrays of bytes, packed by gzip or not."""

import math
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sources.files import unpacked
from sources.loaded import Loaded, Part
from storage.files import may_unpack_to, open_regular, refusing

START = b"\0\0"  # then a byte for the type, and one for the number of axes
BYTES = 0x08  # the type of unsigned bytes, the only one that is read
AXES = (1, 3, 4)  # labels (n,), and images (n, H, W) or (n, H, W, C)

_NAME = re.compile(r"(.*?)(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")  # of a file of images
_SPLITS = {"train": "train", "t10k": "test", "test": "test"}


def is_idx(start: bytes) -> bool:
    """True if a file that begins with `start`, unpacked, may be an idx file."""
    return len(start) > 4 and start[:2] == START and 0x08 <= start[2] <= 0x0E and start[3] < 8


def in_folder(path: Path) -> Loaded | None:
    """The splits in the folder at `path`, or below it in raw/, as torchvision has them.

    None where there are none. Raises ValueError where there are several, such as EMNIST's.
    """
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        names = os.listdir(folder) if folder.is_dir() else []
        files: dict[str, dict[str, Path]] = {}
        for match in filter(None, map(_NAME.fullmatch, sorted(names, reverse=True))):
            # of a file and its .gz the first counts, which comes last here
            if (folder / match[0]).is_file():
                files.setdefault(match[1], {})[_SPLITS[match[2]]] = folder / match[0]
        whole = [splits for splits in files.values() if len(splits) == 2]
        if len(whole) > 1:
            example = sorted(splits["train"].name for splits in whole)[0]
            raise ValueError(
                f"data.path={path} holds {len(whole)} data sets: name the images of one, such as "
                f"{folder / example}, or give each a folder"
            )
        if whole:
            return Loaded(
                path, {split: partial(_part, whole[0][split]) for split in _SPLITS.values()}
            )
    return None


def of_file(path: Path) -> Loaded:
    """The images of one file, and the labels of that beside it whose name says so."""
    return Loaded(path, {"": partial(_part, path)})


def _part(path: Path) -> Part:
    images = read_idx(path)
    if images.ndim < 3:
        raise ValueError(f"data.path={path} holds labels: name the file of the images")
    beside = _labels_beside(path)
    labels = None if beside is None else read_idx(beside)
    if labels is not None and labels.ndim != 1:
        raise ValueError(f"{beside} holds no labels: its shape is {labels.shape}")
    return Part(images if images.ndim == 4 else images[..., None], labels)


def _labels_beside(path: Path) -> Path | None:
    """The file of labels, t10k-labels-idx1-ubyte.gz of t10k-images-idx3-ubyte; None without any."""
    if "images" not in path.name:
        return None
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    places = [path.with_name(name + suffix) for suffix in ("", ".gz")]
    return next((place for place in places if place.is_file()), None)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of the idx file at `path`; ValueError where it is none, or of other types."""
    with refusing(path, "cannot be read as an idx file"), open_regular(path) as file:
        size = path.stat().st_size
        content = unpacked(file)
        start = content.read(4)
        if not is_idx(start + b"\0"):
            raise ValueError("it does not begin like one")
        kind, axes = start[2], start[3]
        if kind != BYTES or axes not in AXES:
            raise ValueError(
                f"it holds type 0x{kind:02X} on {axes} axes; images are unsigned bytes, type 0x08, "
                "on 3 or 4: save others as .npy"
            )
        shape = tuple(np.frombuffer(content.read(4 * axes), ">u4").tolist())
        number = math.prod(shape)
        if len(shape) != axes or not number:
            raise ValueError(f"its shape is {shape}")
        if number > (size if content is file else may_unpack_to(size)):
            raise ValueError(f"it claims {number:,} bytes, which it cannot hold")
        array = np.frombuffer(content.read(number + 1), np.uint8)
        if len(array) > number:
            raise ValueError(f"it holds more than the {number:,} bytes of its shape {shape}")
        if len(array) < number:
            raise ValueError(f"it is cut off: {len(array):,} bytes of {number:,}")
        return array.reshape(shape)
