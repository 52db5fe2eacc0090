"""Files of torch.save, read as data: no class is imported, nothing in the file is called.

They are a pickle, which `storage.inert_pickle` reads, and the memory of its tensors. `torch.load`
with `weights_only` would let a pickle call `bytearray(10**12)`, and where its reader of zip files
and Python's find different records, what one has checked is not what the other loads.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import Tensor

from storage.inert_pickle import Record, Unpickler, kind
from storage.stored_tensors import OpenFile, Storage, StoredView

MAX_DIMENSIONS = 8  # of a tensor
MAX_LENGTH = 2**40  # of an axis or of a storage, in numbers
ZIP = b"PK\x03\x04"  # begins what torch.save writes
HEADER = 30  # bytes of a record's header; the last four are the lengths of what follows it

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


# --- tensors -------------------------------------------------------------------------------------


def _view(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> StoredView:
    """A tensor that lies within its storage; the arguments are those of `_rebuild_tensor_v2`."""
    if not isinstance(storage, Storage):
        raise ValueError(f"the memory of a tensor is {kind(storage)}, which is not read here")
    if metadata:  # of a tensor whose elements are to be negated or conjugated
        raise ValueError("a tensor has metadata, which are not read here")
    tuples = type(size) is type(stride) is tuple and len(size) == len(stride) <= MAX_DIMENSIONS
    numbers = (offset, *size, *stride) if tuples else ()
    if not numbers or not all(type(n) is int and 0 <= n < MAX_LENGTH for n in numbers):
        raise ValueError("the shape of a tensor is damaged")
    numel = math.prod(size)
    extent = sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if numel else 0
    # An expanded tensor (stride 0) has more numbers than its memory; published weights have not.
    if max(numel, offset + extent) > storage.numel:
        raise ValueError("a tensor reaches beyond its memory")
    return StoredView(storage, offset, size, stride)


def _dictionary() -> dict:
    return {}  # of any class: a pickle calls it without arguments, and sets its items later


def _tensor(*arguments) -> Tensor:
    return _view(*arguments).share()


KNOWN = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
}
_STATES = KNOWN.keys() | _DTYPES.keys()  # names in a state that torch.save wrote


# --- states of a run -----------------------------------------------------------------------------


def read_state(file: BinaryIO, stored: bool = False) -> tuple[object, list[Storage]]:
    """The content of a file of `torch.save` and, for all its tensors, the storages.

    It consists of tensors, numbers, strings, lists, tuples and dictionaries; a hostile file may put
    a `Record` or another strange object in the place of any of these. The tensors are on the CPU,
    lie within the memory that the file has for them, and share it where they did. Memory is bounded
    by twice the size of the file and a few hundred MiB.

    Args:
        file: is closed when nothing refers to its storages any more.
        stored: a `StoredTensor` stands for each tensor; their numbers are not read.

    Raises:
        ValueError: it is damaged, or names a class or function that no state has.
    """
    calls = KNOWN if stored else KNOWN | {"torch._utils._rebuild_tensor_v2": _tensor}
    return _read_zip(file, Unpickler(calls, _STATES))


# --- the formats of torch.save -------------------------------------------------------------------


def _read_zip(file: BinaryIO, unpickler: Unpickler) -> tuple[object, list[Storage]]:
    """The object and the storages of a file of torch.save since PyTorch 1.6.

    It is a zip file of a pickle and each storage, not compressed, with a CRC-32 of each. Storages
    are read where they lie: zipfile's own reader copies them twice, at half the speed.
    """
    opened, storages = OpenFile(file), {}
    if not zipfile.is_zipfile(file):
        raise ValueError("it is cut short, or not from torch.save of PyTorch 1.6 or later")
    archive = zipfile.ZipFile(file)
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
    order = f"{folder}byteorder"
    if order in records and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian")
    content = io.BytesIO(archive.read(pickles[0]))

    def storage(identity: object) -> Storage:
        dtype, numel, key = _storage_identity(identity)
        record = records.get(f"{folder}data/{key}")
        if record is None or record.file_size != numel * dtype.itemsize:
            raise ValueError(f"it is damaged: it has no memory {key!r:.100} of this size")
        if key not in storages:
            file.seek(record.header_offset + HEADER - 4)
            position = record.header_offset + HEADER + sum(struct.unpack("<HH", file.read(4)))
            storages[key] = Storage(record.filename, dtype, numel, opened, position, record.CRC)
        if storages[key].dtype != dtype:
            raise ValueError(f"it is damaged: memory {key!r:.100} has two types")
        return storages[key]

    return unpickler.load(content, storage), [*storages.values()]


def _read_legacy(file: BinaryIO, unpickler: Unpickler) -> object:
    """The object of a plain pickle, or of what torch.save wrote before PyTorch 1.6.

    The latter is a magic number, a version, and the sizes of types, each a pickle; the pickle of
    the object; a pickled list of the keys of its storages; and each of these, 8 bytes that give
    the number of its elements and then the elements.
    """
    result = unpickler.load(file)
    if type(result) is not int or result != _LEGACY_MAGIC:
        return result
    _, system = unpickler.load(file), unpickler.load(file)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    opened, storages = OpenFile(file), {}

    def persistent(identity: object) -> object:
        if type(identity) is tuple and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # the class of a module; the others are its source code
        dtype, numel, key = _storage_identity(identity)
        storage = storages.setdefault(key, Storage(key, dtype, numel, opened))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise ValueError(f"it is damaged: memory {key!r:.100} has two types")
        return storage

    result, keys = unpickler.load(file, persistent), unpickler.load(file)
    if type(keys) is not list or any(type(k) is not str or k not in storages for k in keys):
        raise ValueError("it is damaged: the list of its tensors' memory")
    for storage in map(storages.get, keys):
        if int.from_bytes(file.read(8), "little") != storage.numel:
            raise ValueError("it is damaged: the memory of a tensor has another size")
        storage.position = file.tell()
        file.seek(storage.numel * storage.dtype.itemsize, os.SEEK_CUR)
    if file.tell() > file.seek(0, os.SEEK_END):
        raise ValueError("it is cut short: the memory of a tensor is missing")
    return result


def _storage_identity(identity: object) -> tuple[torch.dtype, int, str]:
    """dtype, number of elements and key of what torch.save calls a storage."""
    match identity:
        case ("storage", Record(name=name), str(key), _, int(numel), *rest) if rest in ([], [None]):
            pass
        case _:
            raise ValueError("it is damaged: it refers to memory in another way than torch.save")
    if name not in _DTYPES:
        raise ValueError(f"it has a tensor of {name!r:.100}, which is not read here")
    if not 0 <= numel < MAX_LENGTH or len(key) > 100:
        raise ValueError("it is damaged: the size or key of a tensor's memory")
    return _DTYPES[name], numel, key


# --- any of these forms --------------------------------------------------------------------------


def read_pickles(file: BinaryIO, makers: dict[str, Callable]) -> object:
    """The content of a plain pickle, or of a file of torch.save of any age.

    There is a `StoredView` for each tensor, what `makers` make of the names in it, and a `Record`
    for everything else. A storage within a plain pickle is the bytes of a file of its own.

    Raises:
        ValueError: it is damaged, or holds a tensor that is not read here.
    """
    within = Unpickler(KNOWN)
    storages: dict[int, tuple[bytes, object]] = {}  # a pickle can name the same bytes many times

    def load_from_bytes(content: object) -> object:
        if not isinstance(content, bytes):
            raise ValueError(f"the memory of a tensor is {kind(content)}, not bytes")
        if id(content) not in storages:
            storages[id(content)] = content, _read(io.BytesIO(content), within)
        return storages[id(content)][1]

    calls = KNOWN | makers | {"torch.storage._load_from_bytes": load_from_bytes}
    return _read(file, Unpickler(calls, operations=within.operations))


def _read(file: BinaryIO, unpickler: Unpickler) -> object:
    zipped = file.read(4) == ZIP
    file.seek(0)
    if zipped:
        return _read_zip(file, unpickler)[0]
    return _read_legacy(io.BytesIO(file.read()), unpickler)
