"""The records of TFRecord files: their places in a file, and their content.

A record is its length (8 bytes, little endian), a checksum of these, the data, and a checksum of
the data (tensorflow.org/tutorials/load_data/tfrecord). TensorBoard's event files are such files.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from storage.files import about, open_regular


def record_index(path: Path) -> NDArray[np.int64]:
    """First byte and size of the data of each record, (n, 2)."""
    index = []
    with about(path):
        file = open_regular(path)
    with file:
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
    """The records of a file that may still be written to: as far as they are whole.

    Raises ValueError where the length of one is damaged, as among the zeros of a sparse file.
    """
    with open_regular(path) as file:
        end = os.fstat(file.fileno()).st_size
        while len(head := file.read(12)) == 12:
            (size,) = struct.unpack("<Q", checked(head))
            record = file.read(size) if size < end else b""
            if len(file.read(4)) < 4:
                return
            yield record


def checked(data: bytes) -> bytes:
    """`data` without the masked CRC-32C that follows it; ValueError where that does not match."""
    crc = google_crc32c.value(data[:-4])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if len(data) < 4 or struct.unpack("<I", data[-4:]) != (masked,):
        raise ValueError("its checksum is wrong")
    return data[:-4]
