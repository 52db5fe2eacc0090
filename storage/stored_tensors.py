"""Tensors of an open file: their shapes are known, their numbers are read on demand."""

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

PIECE = 2**20  # bytes read at once


class Memory:
    """The bytes of an open file from `position` on."""

    def __init__(self, file: BinaryIO, position: int):
        self.file, self.position = file, position

    def read(self, start: int, end: int) -> bytearray:
        """Bytes number `start` to `end`; ValueError where they are missing or damaged."""
        content = bytearray(end - start)
        with memoryview(content) as view:
            self.fill(start, pieces_of(view))
        return content

    def check(self) -> None:
        """Raise ValueError where the bytes are known to be damaged."""

    def fill(self, start: int, pieces: Iterable[memoryview]) -> int:
        """Fill the `pieces` with the bytes from number `start` on; their CRC-32."""
        checksum = 0
        self.file.seek(self.position + start)
        for piece in pieces:
            if self.file.readinto(piece) != len(piece):
                raise ValueError("it is cut short: the memory of a tensor is missing")
            checksum = zlib.crc32(piece, checksum)
        return checksum


def pieces_of(view: memoryview) -> Iterator[memoryview]:
    return (view[start : start + PIECE] for start in range(0, len(view), PIECE))


@dataclass(slots=True, eq=False)
class Storage:
    """The numbers of one or more tensors; `memory` is None until the file is read that far."""

    dtype: torch.dtype
    numel: int
    memory: Memory | None
    shared: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int, end: int) -> Tensor:
        """Numbers `start` to `end`, as a new vector."""
        if self.memory is None:
            raise ValueError("it is cut short: the memory of a tensor is missing")
        if start == end:
            return torch.empty(0, dtype=self.dtype)
        size = self.dtype.itemsize
        return torch.frombuffer(self.memory.read(start * size, end * size), dtype=self.dtype)

    def share(self) -> Tensor:
        """All numbers, as the same vector at every call."""
        if self.shared is None:
            self.shared = self.read(0, self.numel)
        return self.shared


@dataclass(slots=True, eq=False)
class StoredTensor:
    """A tensor in a file: a range of a storage, checked to lie within it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.size)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def load(self) -> Tensor:
        """The tensor, on the CPU, in memory of its own that only the caller references.

        Raises:
            ValueError: the file is damaged there.
        """
        numel = math.prod(self.size)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        numbers = self.storage.read(self.offset, last + 1 if numel else self.offset)
        return numbers.as_strided(self.size, self.stride)

    def share(self) -> Tensor:
        """The tensor, sharing memory with the others of its storage, as when it was saved.

        All tensors of a file together are no larger than the file, since no two storages share
        bytes: each is a record of a zip file, a section of a legacy file, or an object of a pickle
        that is read once.
        """
        return self.storage.share().as_strided(self.size, self.stride, self.offset)
