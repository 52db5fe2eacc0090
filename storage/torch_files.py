"""What torch.save writes, read as data: no class is imported, nothing in the file is called.

It is a pickle, which `storage.inert_pickle` reads, and the memory of its tensors. `torch.load` with
`weights_only` would let a pickle call `bytearray(10**12)`, and where its reader of zip files and
Python's find different records, what one has checked is not what the other loads.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import torch
from torch import Tensor

from storage.inert_pickle import Name, kind, unpickle

MAX_OPERATIONS = 1_000_000  # of all pickles of a file; ImageNet's network takes a tenth
MAX_DIMENSIONS = 8  # of a tensor
ZIP = b"PK\x03\x04"  # begins what torch.save writes
PIECE = 2**20  # bytes read at once
LENGTHS = 26  # bytes before the lengths of name and extra field in a record's header

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins what torch.save wrote before PyTorch 1.6
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
}


def read_state(file: BinaryIO) -> object:
    """What `torch.save` wrote to `file`: tensors, numbers, strings, lists, tuples, dictionaries.

    The tensors are on the CPU, lie within the memory that the file has for them, and share it where
    they did. A hostile file may put a `Record` or another strange object in the place of any of
    these. Memory is bounded by twice the size of the file and a few hundred MiB.

    Raises:
        ValueError: it is damaged, or names a class or function that no state has.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError("it is cut short, or not from torch.save of PyTorch 1.6 or later")
    known = KNOWN | {"torch._utils._rebuild_tensor_v2": lambda *args: _rebuild_tensor(*args).load()}
    return read_zip(file, iter(range(MAX_OPERATIONS)), known, known.keys() | _DTYPES.keys())


def peek_state(file: BinaryIO) -> object:
    """What `read_state` gives, but `StoredTensor` in place of tensors, whose memory is not read."""
    return read_zip(file, iter(range(MAX_OPERATIONS)), KNOWN, KNOWN.keys() | _DTYPES.keys())


# --- tensors -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Storage:
    """The memory of tensors; `read` gives its bytes, None until the file is read that far."""

    dtype: torch.dtype
    numel: int
    read: Callable[[], bytearray] | None
    flat: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def load(self) -> Tensor:
        """All of it, as one vector."""
        if self.read is None:
            raise ValueError("it is cut short: the memory of a tensor is missing")
        if self.flat is None:
            empty = torch.empty(0, dtype=self.dtype)
            self.flat = torch.frombuffer(self.read(), dtype=self.dtype) if self.numel else empty
        return self.flat


@dataclass(slots=True, eq=False)
class StoredTensor:
    """A tensor: its place in a storage, checked to lie within."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """The tensor, which shares memory with the others of its storage, as it did.

        All those of a file are together no larger than it, since a storage has its bytes for
        itself: a record of a zip file, a section of a legacy file, or an object of a pickle that is
        read once.
        """
        return self.storage.load().as_strided(self.size, self.stride, self.offset)


def _rebuild_tensor(
    storage, offset, size, stride, requires_grad, hooks, metadata=None
) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise ValueError(f"the memory of a tensor is {kind(storage)}, which is not read here")
    if metadata:  # of a tensor whose elements are to be negated or conjugated
        raise ValueError("a tensor has metadata, which are not read here")
    for numbers in (size, stride):
        if type(numbers) is not tuple or len(numbers) > MAX_DIMENSIONS:
            raise ValueError("the shape of a tensor is damaged")
    whole = all(type(n) is int and 0 <= n < 2**40 for n in (offset, *size, *stride))
    if not whole or len(size) != len(stride):
        raise ValueError("the shape of a tensor is damaged")
    numel = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if numel else offset
    # An expanded tensor (stride 0) has more elements than memory; no published weights have.
    if numel > storage.numel or last >= storage.numel + (numel == 0):
        raise ValueError("a tensor reaches beyond its memory")
    return StoredTensor(storage, offset, size, stride)


def _rebuild_parameter(data, requires_grad, hooks) -> object:
    return data


def dictionary() -> dict:
    """What is called to make a dictionary of a class, without arguments."""
    return {}


KNOWN = {
    "collections.OrderedDict": dictionary,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}


# --- the formats of torch.save -------------------------------------------------------------------


def read_zip(
    file: BinaryIO, operations: Iterator, known: dict, names: Collection[str] | None = None
) -> object:
    """What torch.save wrote since PyTorch 1.6: a zip file of a pickle and of each storage.

    For the arguments, and what is raised, see `unpickle`. A record's checksum is compared as it is
    read.
    """
    archive = zipfile.ZipFile(file)  # not closed: storages are read from it later
    records = {record.filename: record for record in archive.infolist()}
    if sum(record.file_size for record in records.values()) > file.seek(0, os.SEEK_END):
        raise ValueError("its records are larger than the file")
    for record in records.values():
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ValueError(f"its record {record.filename!r:.100} is compressed")
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip file, but not from torch.save: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in records and _read_record(archive, f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    storages: dict[str, _Storage] = {}

    def persistent(identity: object) -> object:
        dtype, numel, key = _storage_identity(identity)
        name = f"{folder}data/{key}"
        found = storages.setdefault(key, _Storage(dtype, numel, None))
        if (found.dtype, found.numel) != (dtype, numel) or name not in records:
            raise ValueError(f"it is damaged: no memory {key!r:.100} of this type")
        if records[name].file_size != found.nbytes:
            raise ValueError(f"it is damaged: memory {key!r:.100} has another size")
        found.read = partial(_read_record, archive, name)
        return found

    content = io.BytesIO(_read_record(archive, pickles[0]))
    return unpickle(content, operations, known, persistent, names)


def _read_record(archive: zipfile.ZipFile, name: str) -> bytearray:
    """The bytes of a stored record; ValueError where they do not have the checksum it gives.

    They are read where they lie: zipfile's own reader copies them twice, at half the speed.
    """
    record, file = archive.getinfo(name), archive.fp
    content, checksum = bytearray(record.file_size), 0
    damaged = f"it is damaged: its record {name!r:.100} differs from its checksum or header"
    try:
        archive.open(record).close()  # compares its header with the directory
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(damaged) from error
    file.seek(record.header_offset + LENGTHS)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(name_length + extra_length, os.SEEK_CUR)
    with memoryview(content) as view:
        for start in range(0, len(content), PIECE):
            piece = view[start : start + PIECE]
            file.readinto(piece)  # what a file cut short does not fill has another checksum
            checksum = zlib.crc32(piece, checksum)
    if checksum != record.CRC:
        raise ValueError(damaged)
    return content


def _copied(content: bytes, start: int, end: int) -> bytearray:
    return bytearray(memoryview(content)[start:end])


def read_bytes(content: bytes, operations: Iterator, known: dict) -> object:
    """A plain pickle, or what torch.save wrote before PyTorch 1.6.

    The latter is a magic number, a version, and the sizes of types, each a pickle; the pickle of
    the object; a pickled list of the keys of its storages; and each of these, 8 bytes that give
    the number of its elements and then the elements.
    """
    file = io.BytesIO(content)
    result = unpickle(file, operations, known)
    if type(result) is not int or result != _LEGACY_MAGIC:
        return result
    _, system = unpickle(file, operations, {}), unpickle(file, operations, {})
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    storages: dict[str, _Storage] = {}

    def persistent(identity: object) -> object:
        if type(identity) is tuple and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # the class of a module; the others are its source code
        dtype, numel, key = _storage_identity(identity)
        found = storages.setdefault(key, _Storage(dtype, numel, None))
        if (found.dtype, found.numel) != (dtype, numel):
            raise ValueError(f"it is damaged: memory {key!r:.100} has two types")
        return found

    result = unpickle(file, operations, known, persistent)
    keys = unpickle(file, operations, {})
    if type(keys) is not list or any(type(k) is not str or k not in storages for k in keys):
        raise ValueError("it is damaged: the list of its tensors' memory")
    position = file.tell()
    for storage in map(storages.get, keys):
        start, position = position + 8, position + 8 + storage.nbytes
        if int.from_bytes(content[start - 8 : start], "little") != storage.numel:
            raise ValueError("it is damaged: the memory of a tensor has another size")
        if position > len(content):
            raise ValueError("it is cut short: the memory of a tensor is missing")
        storage.read = partial(_copied, content, start, position)
    return result


def storage_reader(operations: Iterator) -> Callable[[object], object]:
    """Reads a storage within a plain pickle: the bytes of a file of torch.save of its own."""
    read: dict[int, tuple[bytes, object]] = {}  # a pickle can name the same bytes many times

    def load_from_bytes(content: object) -> object:
        if not isinstance(content, bytes):
            raise ValueError(f"the memory of a tensor is {kind(content)}, not bytes")
        if id(content) not in read:
            if content.startswith(ZIP):
                storage = read_zip(io.BytesIO(content), operations, KNOWN)
            else:
                storage = read_bytes(content, operations, KNOWN)
            read[id(content)] = content, storage
        return read[id(content)][1]

    return load_from_bytes


def _storage_identity(identity: object) -> tuple[torch.dtype, int, str]:
    """dtype, number of elements and key of what torch.save calls a storage."""
    match identity:
        case ("storage", Name(name=name), str(key), _, int(numel)):
            pass
        case ("storage", Name(name=name), str(key), _, int(numel), None):
            pass
        case _:
            raise ValueError("it is damaged: it refers to memory in another way than torch.save")
    if name not in _DTYPES:
        raise ValueError(f"it has a tensor of {name!r:.100}, which is not read here")
    if not 0 <= numel < 2**40 or len(key) > 100:
        raise ValueError("it is damaged: the size or key of a tensor's memory")
    return _DTYPES[name], numel, key
