"""TFRecord files and the messages in them, read without TensorFlow.

A record is its length (8 bytes, little endian), a checksum of these, the data, and a checksum of
the data (tensorflow.org/tutorials/load_data/tfrecord). The data of an image are a tf.train.Example,
a protobuf message that maps names to features (protobuf.dev/programming-guides/encoding).
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from sources.base import Picture, Unreadable, reason


class TFRecords:
    """The images of TFRecord files, found once; `parse` makes a picture of the data of one.

    Raises:
        ValueError: a file ends within a record, or a length is damaged; the file is named.
    """

    def __init__(self, paths: list[Path], parse: Callable[[bytes], Picture]):
        self.paths, self.parse = paths, parse
        indices = [record_index(path) for path in paths]
        self.file = np.repeat(np.arange(len(paths)), [len(index) for index in indices])
        self.start, self.size = np.concatenate(indices).T

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i: int) -> Picture:
        path = self.paths[self.file[i]]
        try:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), self.size[i] + 4, self.start[i])
            return self.parse(checked(data))
        except Exception as error:  # a damaged record makes the parser fail in any way
            raise Unreadable(
                f"{path}, record at byte {self.start[i] - 12}: {reason(error)}"
            ) from error


def record_index(path: Path) -> NDArray[np.int64]:
    """Where the data of each record start, and their size: (n, 2)."""
    index = []
    with open(path, "rb") as file:
        at, end = 0, os.fstat(file.fileno()).st_size
        while at < end:
            try:
                (size,) = struct.unpack("<Q", checked(os.pread(file.fileno(), 12, at)))
                if at + size + 16 > end:
                    raise ValueError("the file ends within it")
            except ValueError as error:
                raise ValueError(
                    f"{path} is damaged or no TFRecord file: record {len(index)}, at byte {at} of "
                    f"{end}: {error}"
                ) from error
            index.append((at + 12, size))
            at += size + 16
    return np.array(index, dtype=np.int64).reshape(-1, 2)


def whole_records(path: Path) -> Iterator[bytes]:
    """The records of a file that may still be written to: as far as they are whole."""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        while len(head := file.read(12)) == 12:
            (size,) = struct.unpack("<Q", head[:8])
            record = file.read(size) if size < end else b""
            if len(file.read(4)) < 4:
                return
            yield record


def checked(data: bytes) -> bytes:
    """`data` without the masked CRC-32C that follows it; ValueError where that is another."""
    crc = google_crc32c.value(data[:-4])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if len(data) < 4 or struct.unpack("<I", data[-4:]) != (masked,):
        raise ValueError("its checksum is wrong")
    return data[:-4]


def parse_example(data: bytes) -> dict[str, memoryview]:
    """The features of a serialised tf.train.Example, each still serialised, by name.

    Raises:
        ValueError, TypeError, LookupError: `data` are not one.
    """
    found = {}
    for features in _values(memoryview(data), 1):
        for entry in _values(features, 1):
            fields = dict(_fields(entry))
            found[bytes(fields[1]).decode()] = fields[2]
    return found


def bytes_feature(feature: memoryview) -> memoryview:
    (values,) = _values(feature, 1)
    (value,) = _values(values, 1)
    return value


def int_feature(feature: memoryview) -> list[int]:
    (values,) = _values(feature, 3)
    numbers = []
    for value in _values(values, 1):  # one by one, or packed into one field
        at = 0
        while not isinstance(value, int) and at < len(value):
            number, at = _varint(value, at)
            numbers.append(number)
        numbers += [value] if isinstance(value, int) else []
    return numbers


def _values(message: memoryview, number: int) -> list:
    return [value for n, value in _fields(message) if n == number]


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field (protobuf.dev/programming-guides/encoding)."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        else:
            fixed = {1: 8, 5: 4}
            if kind == 2:
                size, at = _varint(message, at)
            elif kind in fixed:
                size = fixed[kind]
            else:
                raise ValueError(f"unknown wire type {kind}")
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("a field ends beyond its message")
        yield tag >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that starts at byte `at`, seven bits a byte, and where it ends."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("a number without an end")
