"""Shared files: EMA weights, a config and a step as one file in safetensors form, without code.

Eight bytes give the length of a header, which is JSON, {"name": {"dtype": "F32", "shape": [2, 3],
"data_offsets": [0, 24]}, ..., "__metadata__": {"key": "value"}}; the rest is the tensors' memory,
little-endian, without gaps (github.com/huggingface/safetensors). The library reads it. It does not
write it, since `save_file` leaves a file of its own name and permissions that is not flushed to
disk, and `save` takes twice the memory of the weights.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from storage.digests import digest
from storage.files import MAX_JSON, atomic_write, open_regular, refusing
from storage.stored_tensors import StoredTensor

SHARED = ".safetensors"  # what `--mode export` writes
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


def save_shared(
    path: Path,
    weights: Mapping[str, Tensor],
    values: dict[str, Any],
    step: int,
    data: dict | None = None,
) -> None:
    """Write EMA weights by name, the flat config `values` and the `step` as one file.

    `data` is the entry `data` of checkpoints.

    Raises:
        OSError: the file cannot be written; the message names it.
        ValueError: a weight has a dtype that the format does not have.
    """
    metadata = {
        "format": "pt",
        "config": json.dumps(values),
        "step": str(step),
        "data_range": "[-1, 1]" if values["data.centered"] else "[0, 1]",
    }
    if data is not None:
        metadata["data"] = json.dumps(data)
    metadata["checksum"] = checksum(weights, metadata)
    with atomic_write(path) as file:
        write(file, weights, metadata)


def open_shared(path: Path, intact: bool = False) -> dict[str, Any]:
    """The weights (`model`, as `StoredTensor`s), `step`, `config` and `data` of a shared file.

    The file stays open while the weights are referenced, even if another takes its name.

    Args:
        path: of the file.
        intact: read the whole file, tensor by tensor, to detect damage.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged, or no file of `save_shared`.
    """
    with refusing(path, "is not a shared model"):
        weights, metadata = read(path)
        step, stored_checksum = metadata.get("step", ""), metadata.pop("checksum", None)
        if not re.fullmatch(r"[0-9]{1,15}", step) or "config" not in metadata:
            raise ValueError("its metadata lack the config or the step that --mode export writes")
        if intact and stored_checksum != checksum(weights, metadata):
            raise ValueError("it is damaged: its content differs from its checksum")
        return {
            "model": weights,
            "step": int(step),
            "config": json.loads(metadata["config"]),
            "data": json.loads(metadata.get("data", "null")),
        }


def checksum(weights: Mapping[str, Tensor | StoredTensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all that a shared file says: damage is found, an author's lie is not."""
    words = [digest(dict(sorted(weights.items()))), *map("=".join, sorted(metadata.items()))]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


# --- the format ----------------------------------------------------------------------------------


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `tensors` and `metadata`; those of wider numbers come first, so that all are aligned.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in names:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors do not have")
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    file.write(len(words).to_bytes(8, "little") + words)
    for _, tensor in ordered:
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def read(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata; memory is bounded by a few times the size of the header.

    The library reads tensors by `pread`: pages of a mapped file would count as memory, and end the
    process by SIGBUS where the file has become shorter meanwhile.

    Raises:
        ValueError: the file is damaged, of another format, or its header is above `MAX_JSON`.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_JSON:
        raise ValueError(f"it is no safetensors file, or its header is above {MAX_JSON >> 20} MiB")
    try:
        file = safetensors.safe_open(path, "pt", backend="pread")
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is damaged, or no safetensors file: {error}") from error
    tensors: dict[str, StoredTensor] = {}
    for name in file.keys():  # noqa: SIM118
        entry = file.get_slice(name)
        if entry.get_dtype() not in DTYPES:
            raise ValueError(f"{name!r:.100} is of {entry.get_dtype()}, which is not read here")
        shape, dtype = torch.Size(entry.get_shape()), DTYPES[entry.get_dtype()]
        tensors[name] = SharedTensor(file, name, shape, dtype)
    return tensors, file.metadata() or {}


@dataclass(slots=True, eq=False)
class SharedTensor(StoredTensor):
    """A tensor in a shared file that is open."""

    file: safetensors.safe_open
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def load(self) -> Tensor:
        try:
            return self.file.get_tensor(self.name)
        except safetensors.SafetensorError as error:  # the file has become shorter
            raise ValueError(f"it is damaged: {error}") from error
