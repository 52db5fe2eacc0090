"""The safetensors format: tensors by name and words about them, in one file without code.

Eight bytes give the length of a header, which is JSON, {"name": {"dtype": "F32", "shape": [2, 3],
"data_offsets": [0, 24]}, ..., "__metadata__": {"key": "value"}}; the rest is the tensors' memory,
little-endian, without gaps (github.com/huggingface/safetensors).
"""

import json
import math
import os
import weakref
from typing import Any, BinaryIO

import torch
from torch import Tensor

from storage.stored_tensors import Memory, Storage, StoredTensor

MAX_HEADER = 100_000_000  # bytes, as in the format's own reader
MAX_DIMENSIONS = 8
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `tensors` and `metadata`; those of wider numbers come first, so that all are aligned.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {METADATA: metadata}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in names:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors do not have")
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    file.write(len(words).to_bytes(8, "little") + words)
    for _, tensor in ordered:
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def open_tensors(file: BinaryIO) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata; memory is bounded by a few times the size of the header.

    The file stays open while the tensors are referenced.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError("it is cut short, or no safetensors file: its header is larger than it")
    header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    if type(header) is not dict:
        raise ValueError("its header is no dictionary")
    metadata = header.pop(METADATA, {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise ValueError("its metadata are not words")
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ValueError(f"the memory of {name!r:.100} overlaps another or leaves a gap")
        end = stop
    if end != size - 8 - length:
        raise ValueError(
            f"it is damaged: {size - 8 - length:,} bytes of tensors instead of {end:,}"
        )
    memory, tensors = Memory(file, 8 + length), {}
    weakref.finalize(memory, file.close)
    for name, (dtype, shape, start, _) in entries.items():
        if start % dtype.itemsize:
            raise ValueError(f"the memory of {name!r:.100} is not aligned")
        size = dtype.itemsize
        storage = Storage(dtype, end // size, memory)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        strides = strides if math.prod(shape) else [0] * len(shape)
        tensors[name] = StoredTensor(storage, start // size, tuple(shape), tuple(strides))
    return tensors, metadata


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name in its header occurs twice")
    return found


def _entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """dtype, shape, and where the memory starts and ends."""
    damaged = f"the entry {name!r:.100} of its header is damaged"
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(damaged)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"{damaged}: a dtype that is not known")
    for numbers in (shape, offsets):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(damaged)
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2 or max([0, *shape]) >= 2**40:
        raise ValueError(damaged)
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{damaged}: its memory has another size")
    return DTYPES[dtype], shape, *offsets
