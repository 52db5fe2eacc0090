"""Types of the numbers in arrays that are no 8-bit images: which are read, and their ranges."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.files import plain

# Stored types that PyTorch has few operations for -> the type that holds their numbers in memory.
WIDER = {"uint16": np.int32, "uint32": np.int64}

DTYPES = ("float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64", *WIDER)


def name_of(dtype: np.dtype) -> str:
    """The name of `dtype` in this machine's byte order; floats of more than 64 bits get 64."""
    return plain(np.empty(0, dtype)).dtype.name


def held(array: NDArray) -> NDArray:
    """`array` in a type that PyTorch computes with."""
    array = plain(array)
    return array.astype(WIDER.get(array.dtype.name, array.dtype), copy=False)


def tensor_of(images: NDArray) -> Tensor:
    """Images as stored, (n, H, W, C), as a tensor (n, C, H, W) that PyTorch computes with."""
    return torch.from_numpy(held(images)).permute(0, 3, 1, 2)


def is_whole(name: str) -> bool:
    """True for types of whole numbers, and for bool, whose numbers are 0 and 1."""
    return np.dtype(name).kind in "biu"


def limits(name: str) -> tuple[float, float]:
    """Smallest and largest number of the type that float64 has too."""
    if name == "bool":
        return 0.0, 1.0
    info = np.iinfo(name) if is_whole(name) else np.finfo(name)
    low, high = float(info.min), float(info.max)
    return low, high if high <= info.max else float(np.nextafter(high, 0))  # 2^63 is no int64
