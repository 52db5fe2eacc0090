"""Files of data as other programs write them, and sources for tests of what reads them."""

import io
import multiprocessing
import os
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from sources.base import Unreadable


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    """Pixels (H, W) or (H, W, C) as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def pictures(n: int, height: int = 8, width: int = 8, channels: int = 3, seed: int = 0):
    """Random uint8 images (n, H, W, C)."""
    shape = (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_tree(root: Path, images, pattern: str = "{i:03d}.png") -> None:
    """Each image as the PNG that `pattern` names; files of `images` that are bytes as they are."""
    for i, image in enumerate(images):
        path = root / pattern.format(i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image if isinstance(image, bytes) else encoded(image))


def write_zip(path: Path, root: Path, top: bool = True) -> None:
    """The tree at `root`, by default with its own name as the top folder, as desktops zip it."""
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(root.rglob("*")):
            file.write(member, member.relative_to(root.parent if top else root).as_posix())


def crc32c(data: bytes) -> int:
    """The definition, bit by bit: polynomial 0x1EDC6F41, reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(*records: bytes) -> bytes:
    """A TFRecord file of `records`."""
    lengths = [struct.pack("<Q", len(record)) for record in records]
    parts = zip(lengths, map(masked, lengths), records, map(masked, records), strict=True)
    return b"".join(b"".join(part) for part in parts)


def varint(value: int) -> bytes:
    low = value & 127
    return bytes([low]) if value < 128 else bytes([low | 128]) + varint(value >> 7)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(packed: bool = True, **features) -> bytes:
    """A tf.train.Example of features that are bytes or lists of integers."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        else:
            numbers = [varint(number) for number in value]
            loose = b"".join(varint(1 << 3) + number for number in numbers)
            feature = field(3, field(1, b"".join(numbers)) if packed else loose)
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def stylegan_example(image: np.ndarray, packed: bool = True) -> bytes:
    """An image (H, W, C) as StyleGAN's dataset_tool.py stores it."""
    planes = image.transpose(2, 0, 1)
    return example(packed, shape=list(planes.shape), data=planes.tobytes())


# --- sources; worker processes import this file, and a test would take them longer ---------------


class Numbers:
    """A source of 1 x 1 images that hold their number, of which some are unreadable."""

    def __init__(self, n, unreadable=()):
        self.n, self.bad = n, unreadable

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise Unreadable(f"image {i} is damaged")
        return np.full((1, 1, 1), i, np.uint8)


class Dying(Numbers):
    """Every worker dies of its first image."""

    def __getitem__(self, i):
        if multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class Interrupting(Numbers):
    """Ctrl-C at the first image, as it reaches every process of a group."""

    def __getitem__(self, i):
        if i == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(i)
