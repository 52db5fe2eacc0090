"""Files of torch.save, read as data: no class is imported, nothing in the file is called.

It is a pickle, which `storage.inert_pickle` reads, and the memory of its tensors. `torch.load` with
`weights_only` would let a pickle call `bytearray(10**12)`, and where its reader of zip files and
Python's find different records, what one has checked is not what the other loads.
"""

import io
import math
import os
import struct
import weakref
import zipfile
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from storage.inert_pickle import Name, kind, unpickle
from storage.stored_tensors import PIECE, Memory, Storage, StoredTensor, pieces_of

MAX_OPERATIONS = 1_000_000  # of all pickles of a file; ImageNet's network takes a tenth
MAX_DIMENSIONS = 8  # of a tensor
ZIP = b"PK\x03\x04"  # begins what torch.save writes
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
    """Content of a file of `torch.save`: tensors, numbers, strings, lists, tuples, dictionaries.

    The tensors are on the CPU, lie within the memory that the file has for them, and share it where
    they did. A hostile file may put a `Record` or another strange object in the place of any of
    these. Memory is bounded by twice the size of the file and a few hundred MiB.

    Raises:
        ValueError: it is damaged, or names a class or function that no state has.
    """
    known = KNOWN | {"torch._utils._rebuild_tensor_v2": _rebuild_shared}
    return _read_archive(_archive(file), iter(range(MAX_OPERATIONS)), known, _STATES)[0]


def open_state(file: BinaryIO) -> tuple[object, Callable[[], None]]:
    """The state of `read_state` with a `StoredTensor` for each tensor, and a check of these.

    The file stays open while they are referenced. The check reads the memory of all
    tensors, piece by piece, and raises ValueError where it is damaged.
    """
    archive = _archive(file)
    weakref.finalize(archive, file.close)
    state, storages = _read_archive(archive, iter(range(MAX_OPERATIONS)), KNOWN, _STATES)

    def check() -> None:
        for storage in storages.values():
            if storage.numel:
                storage.memory.check()

    return state, check


def _archive(file: BinaryIO) -> zipfile.ZipFile:
    if not zipfile.is_zipfile(file):
        raise ValueError("it is cut short, or not from torch.save of PyTorch 1.6 or later")
    return zipfile.ZipFile(file)


# --- tensors -------------------------------------------------------------------------------------


def _rebuild_tensor(
    storage, offset, size, stride, requires_grad, hooks, metadata=None
) -> StoredTensor:
    if not isinstance(storage, Storage):
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


def _rebuild_shared(*args) -> Tensor:
    return _rebuild_tensor(*args).share()


def _rebuild_parameter(data, requires_grad, hooks) -> object:
    return data


def dictionary() -> dict:
    """Constructor of a dictionary of a class, called without arguments."""
    return {}


KNOWN = {
    "collections.OrderedDict": dictionary,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
_STATES = KNOWN.keys() | _DTYPES.keys()  # names in a state that torch.save wrote


# --- the formats of torch.save -------------------------------------------------------------------


class _Record(Memory):
    """A stored record of a zip file.

    It is read where it lies: zipfile's own reader copies it twice, at half the speed.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self.archive, self.record, self.file = archive, archive.getinfo(name), archive.fp
        self.position: int | None = None  # until the header is looked at
        self.checked = False  # against the checksum

    def read(self, start: int = 0, end: int | None = None) -> bytearray:
        """Bytes `start` to `end`, by default all; the first call compares the checksum."""
        size = self.record.file_size
        content = bytearray((size if end is None else end) - start)
        if len(content) < size:
            self.check()
        self._locate()
        with memoryview(content) as view:
            checksum = self.fill(start, pieces_of(view))
        if len(content) == size:
            self._compare(checksum)
        return content

    def check(self) -> None:
        if not self.checked:
            self._locate()
            size = self.record.file_size
            scratch = memoryview(bytearray(min(size, PIECE)))
            pieces = (scratch[: size - start] for start in range(0, size, PIECE))
            self._compare(self.fill(0, pieces))

    def _locate(self) -> None:
        if self.position is None:
            try:
                self.archive.open(self.record).close()  # compares its header with the directory
            except (zipfile.BadZipFile, EOFError) as error:
                raise ValueError(self._damaged()) from error
            self.file.seek(self.record.header_offset + LENGTHS)
            name_length, extra_length = struct.unpack("<HH", self.file.read(4))
            self.position = self.file.tell() + name_length + extra_length

    def _compare(self, checksum: int) -> None:
        if checksum != self.record.CRC:
            raise ValueError(self._damaged())
        self.checked = True

    def _damaged(self) -> str:
        name = self.record.filename
        return f"it is damaged: its record {name!r:.100} differs from its checksum or header"


def read_zip(
    file: BinaryIO, operations: Iterator, known: dict, names: Collection[str] | None = None
) -> object:
    """Content of a file of torch.save since PyTorch 1.6: a zip of a pickle and each storage.

    For the arguments, and what is raised, see `unpickle`. A record's checksum is compared as it is
    read.
    """
    return _read_archive(zipfile.ZipFile(file), operations, known, names)[0]


def _read_archive(
    archive: zipfile.ZipFile,
    operations: Iterator,
    known: dict,
    names: Collection[str] | None,
) -> tuple[object, dict[str, Storage]]:
    """The state of a zip file (see `read_zip`), and its storages, read from the archive later."""
    records = {record.filename: record for record in archive.infolist()}
    if sum(r.file_size for r in records.values()) > archive.fp.seek(0, os.SEEK_END):
        raise ValueError("its records are larger than the file")
    for record in records.values():
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ValueError(f"its record {record.filename!r:.100} is compressed")
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip file, but not from torch.save: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in records and _Record(archive, order).read() != b"little":
        raise ValueError("its numbers are big-endian")
    storages: dict[str, Storage] = {}

    def persistent(identity: object) -> object:
        dtype, numel, key = _storage_identity(identity)
        name = f"{folder}data/{key}"
        storage = storages.setdefault(key, Storage(dtype, numel, None))
        if (storage.dtype, storage.numel) != (dtype, numel) or name not in records:
            raise ValueError(f"it is damaged: no memory {key!r:.100} of this type")
        if records[name].file_size != storage.nbytes:
            raise ValueError(f"it is damaged: memory {key!r:.100} has another size")
        storage.memory = storage.memory or _Record(archive, name)
        return storage

    content = io.BytesIO(_Record(archive, pickles[0]).read())
    return unpickle(content, operations, known, persistent, names), storages


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
    storages: dict[str, Storage] = {}

    def persistent(identity: object) -> object:
        if type(identity) is tuple and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # the class of a module; the others are its source code
        dtype, numel, key = _storage_identity(identity)
        storage = storages.setdefault(key, Storage(dtype, numel, None))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise ValueError(f"it is damaged: memory {key!r:.100} has two types")
        return storage

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
        storage.memory = Memory(file, start)
    return result


def storage_reader(operations: Iterator) -> Callable[[object], object]:
    """Read a storage within a plain pickle: the bytes of a file of torch.save of its own."""
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
