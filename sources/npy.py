"""An array in an .npy file, of which each row is read when it is indexed.

The file is not mapped into memory: where another program writes it again, a mapping ends the
process by SIGBUS, and a read is an error in one line.
"""

import io
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from sources import digests
from sources.base import PerProcess, Unreadable
from storage.files import open_regular

MAGIC = npy.MAGIC_PREFIX  # the first bytes of an .npy file
MAX_HEADER = 2**17  # bytes
PIECE = 2**30  # bytes that are read at once


class Header(NamedTuple):
    """Shape, order of the axes in memory, and dtype of an array."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype

    @classmethod
    def read(cls, file: IO[bytes]) -> tuple[Self, int]:
        """The header of an .npy file, and its length in bytes; ValueError where it is none."""
        start = io.BytesIO(file.read(MAX_HEADER))  # a header may claim to be gigabytes long
        versions = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        version = npy.read_magic(start)
        if version not in versions:
            raise ValueError(f"version {version} of the format is not read")
        header = cls(*versions[version](start))
        if header.dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read")
        return header, start.tell()


@dataclass(frozen=True)
class StoredArray:
    """An array (n, ...) in a file, whose rows are read by their numbers.

    Attributes:
        path: of the file.
        shape, is_fortran, dtype: as in its header.
        offset: bytes before the array in it.
        stamp: size and time of the file's last change, by which a further one is noticed.
        file: opened once in each process.
    """

    path: Path
    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    offset: int
    stamp: tuple[int, int]
    file: PerProcess

    @classmethod
    def open(cls, path: Path) -> Self:
        """The array at `path`; ValueError where the file is damaged, or OSError."""
        opened = PerProcess(partial(open_regular, path))
        file = opened()
        (header, offset), stamp = Header.read(file), _stamp(file)
        array = cls(path, *header, offset, stamp, opened)
        if offset + array.nbytes > stamp[0]:
            raise ValueError(f"it ends after {stamp[0]:,} of {offset + array.nbytes:,} bytes")
        return array

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> NDArray:
        """Row `i`; `Unreadable` where the file has changed."""
        (n, *shape), item = self.shape, self.dtype.itemsize
        if self.is_fortran:
            starts = range(i * item, self.nbytes, n * item)
            content, order = b"".join(self._read(start, item) for start in starts), "F"
        else:
            content, order = self._read(i * self.nbytes // n, self.nbytes // n), "C"
        return np.frombuffer(content, self.dtype).reshape(shape, order=order)

    def whole(self) -> NDArray:
        """All of the array; raises as indexing."""
        starts = range(0, self.nbytes, PIECE)
        content = b"".join(self._read(at, min(PIECE, self.nbytes - at)) for at in starts)
        order = "F" if self.is_fortran else "C"
        return np.frombuffer(content, self.dtype).reshape(self.shape, order=order)

    def digest(self) -> str:
        """The digest of the file's bytes; see `digests.of_array`."""
        return digests.of_blocks(self.dtype, self.shape, self.nbytes, self._read)

    def _read(self, start: int, size: int) -> bytes:
        try:
            file = self.file()
            content = os.pread(file.fileno(), size, self.offset + start)
            if len(content) == size and _stamp(file) == self.stamp:
                return content
        except OSError as error:
            raise Unreadable(f"{self.path}: {error.strerror}") from error
        raise Unreadable(f"{self.path} was written again while it was in use: start again")


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
