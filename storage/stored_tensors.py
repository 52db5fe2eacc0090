"""Tensors of an open file: their shapes are known, their numbers are read on demand."""

import weakref
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

PIECE = 2**20  # bytes read at once, so that their checksum finds them in the cache


class StoredTensor:
    """A tensor in an open file, which stays open while the tensor is referenced."""

    shape: torch.Size
    dtype: torch.dtype

    def load(self) -> Tensor:
        """The tensor, on the CPU, in memory of its own that only the caller references.

        Raises:
            ValueError: the file is damaged there.
        """
        raise NotImplementedError


class OpenFile:
    """An open file that is closed when nothing refers to it any more."""

    def __init__(self, file: BinaryIO):
        self.file = file
        weakref.finalize(self, file.close)


@dataclass(slots=True, eq=False)
class Storage:
    """The numbers of one or more tensors, which lie together in a file."""

    name: str
    dtype: torch.dtype
    numel: int
    source: OpenFile
    position: int | None = None  # of the first byte; None until the file is read that far
    checksum: int | None = None  # CRC-32 of the bytes, where the file has one
    shared: Tensor | None = None

    def read(self) -> Tensor:
        """All numbers as a new vector; ValueError where they are missing or damaged."""
        content = bytearray(self.numel * self.dtype.itemsize)
        with memoryview(content) as view:
            self._read([view[i : i + PIECE] for i in range(0, len(view), PIECE)])
        if not content:
            return torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(content, dtype=self.dtype)

    def check(self) -> None:
        """Raise ValueError where the numbers are damaged; they are not kept in memory."""
        size = self.numel * self.dtype.itemsize
        scratch = memoryview(bytearray(min(size, PIECE)))
        self._read([scratch[: size - i] for i in range(0, size, PIECE)])

    def share(self) -> Tensor:
        """All numbers, as the same vector at every call."""
        if self.shared is None:
            self.shared = self.read()
        return self.shared

    def _read(self, pieces: list[memoryview]) -> None:
        """Fill the pieces with the bytes, one after another, and compare their checksum."""
        if self.position is None:
            raise ValueError("it is cut short: the memory of a tensor is missing")
        file, checksum = self.source.file, 0
        file.seek(self.position)
        for piece in pieces:
            if file.readinto(piece) != len(piece):
                raise ValueError("it is cut short: the memory of a tensor is missing")
            checksum = zlib.crc32(piece, checksum)
        if self.checksum not in (None, checksum):
            record = f"its record {self.name!r:.100}"
            raise ValueError(f"it is damaged: {record} differs from its checksum")


@dataclass(slots=True, eq=False)
class StoredView(StoredTensor):
    """A tensor as PyTorch stores it: a view of a storage, within which it was checked to lie."""

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
        view = self.storage.read().as_strided(self.size, self.stride, self.offset)
        return view if view.numel() == self.storage.numel else view.clone()

    def share(self) -> Tensor:
        """The tensor, sharing memory with the others of its storage, as when it was saved.

        All tensors of a file together are no larger than the file, since no two storages share
        bytes: each is a record of a zip file, a section of a legacy file, or an object of a pickle
        that is read once.
        """
        return self.storage.share().as_strided(self.size, self.stride, self.offset)
