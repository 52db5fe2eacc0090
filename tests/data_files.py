"""Files of data as other programs write them, and sources for tests of what reads them."""

import io
import multiprocessing
import os
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from sources.base import Unreadable


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    """Pixels (H, W) or (H, W, C) as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def png_of_16_bits(values: np.ndarray, transparent: tuple = ()) -> bytes:
    """A PNG of `values` (H, W, C), uint16; C of 1 to 4 is grey, grey and alpha, RGB, RGBA.

    `transparent` is the value of each channel that its tRNS chunk names.
    """
    (height, width, channels), kind = values.shape, {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    if transparent:
        chunks.append((b"tRNS", struct.pack(f">{channels}H", *transparent)))
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(
    values: np.ndarray,
    order: str = "<",
    photometric: int | None = None,
    alpha: int = 2,
    deflate: bool = False,
    planes: bool = False,
) -> bytes:
    """A TIFF of `values` (H, W, C) of any type, of one strip or as many `planes`.

    `photometric` is 0 for white at 0, 1 grey, 2 RGB; `alpha` of a fourth channel is 1 where the
    colours are multiplied by it, 2 where not.
    """
    (height, width, channels), kind = values.shape, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    stored = values.astype(values.dtype.newbyteorder(order))
    strips = [stored[..., i] for i in range(channels)] if planes else [stored]
    strips = [strip.tobytes() for strip in strips]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    starts = 8 + np.cumsum([0, *map(len, strips)])
    photometric = (1 if channels == 1 else 2) if photometric is None else photometric
    tags = [(256, [width]), (257, [height]), (258, channels * [8 * values.itemsize])]
    tags += [(259, [8 if deflate else 1]), (262, [photometric]), (273, starts[:-1].tolist())]
    tags += [(277, [channels]), (278, [height]), (279, [*map(len, strips)])]
    tags += [(284, [2 if planes else 1])] + [(338, [alpha])] * (channels == 4)
    tags += [(339, channels * [kind])]
    at = int(starts[-1])
    entries, beyond, end = b"", b"", at + 2 + 12 * len(tags) + 4
    for tag, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            packed, beyond = struct.pack(f"{order}I", end + len(beyond)), beyond + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return head + b"".join(strips) + directory + beyond


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
