"""Checks of the entries of a state, which come from untrusted files, before they are used."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from configs.keys import shown
from configs.schema import EXACT
from storage.stored_tensors import StoredTensor


def check_keys(given: Any, keys: Collection[str | int], name: str) -> None:
    """Raise ValueError unless `given`, the entry `name` of a state, has these `keys`, no others.

    Files may be untrusted, so nothing in them is used before it is checked.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{name} is no dictionary but of type {type(given).__name__}")
    if missing := [key for key in keys if key not in given]:
        raise ValueError(f"{name} has no {missing[0]}")
    if len(given) > len(keys):
        other = next(key for key in given if key not in keys)
        raise ValueError(f"{name} has the unknown entry {shown(other)}")


def check_like(given: Any, like: Any, name: str) -> None:
    """Raise ValueError unless `given`, the entry `name` of a state, can replace `like`.

    It must be a dictionary of the same keys or a list of the same length, of such entries; a finite
    tensor on the CPU of the same shape and dtype; None; or a number of the same type, from 0 to
    below 2^53. Of a `StoredTensor` shape and dtype are checked; `loaded` checks its numbers.
    """
    if isinstance(like, dict):
        check_keys(given, like.keys(), name)
        for key, entry in like.items():
            check_like(given[key], entry, f"{name}.{key}")
    elif isinstance(like, list):
        if type(given) is not list or len(given) != len(like):
            raise ValueError(f"{name} is not a list of {len(like)} entries")
        for number, (each, entry) in enumerate(zip(given, like, strict=True)):
            check_like(each, entry, f"{name}.{number}")
    elif isinstance(like, Tensor):
        check_tensor(given, name, like.shape, like.dtype)
    elif like is None:
        if given is not None:
            raise ValueError(f"{name} is not None: {shown(given)}")
    elif type(given) is not type(like) or not 0 <= given < EXACT:
        raise ValueError(f"{name} is not a number from 0 to 2^53: {shown(given)}")


def check_tensor(given: Any, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise ValueError unless `given` is a finite, dense tensor of this shape and dtype.

    It may be a `StoredTensor`, whose numbers are not checked.
    """
    if not isinstance(given, StoredTensor) and not _is_dense(given):
        raise ValueError(f"{name} is no dense tensor but of type {type(given).__name__}")
    if given.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(given.shape)}, not {tuple(shape)}")
    if given.dtype != dtype:
        raise ValueError(f"{name} is of {given.dtype}, not {dtype}")
    if isinstance(given, Tensor):
        _check_finite(given, name)


def loaded(given: Tensor | StoredTensor, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor `given`, the entry `name` of a state, as `dtype`; one that is stored is read.

    Raises:
        ValueError: it is not finite, or damaged.
    """
    tensor = (given.load() if isinstance(given, StoredTensor) else given).to(dtype)
    _check_finite(tensor, name)
    return tensor


def _is_dense(given: Any) -> bool:
    if not isinstance(given, Tensor):
        return False
    return given.layout == torch.strided and given.device.type == "cpu"


def _check_finite(tensor: Tensor, name: str) -> None:
    if tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor.detach()))):
        raise ValueError(f"{name} is not finite")
