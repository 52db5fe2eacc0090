"""Checks of the entries of a state, which come from untrusted files, before they are used."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from configs.keys import shown
from configs.schema import EXACT
from storage.stored_tensors import StoredTensor


def check_keys(entry: Any, keys: Collection[str | int], name: str) -> None:
    """Raise ValueError unless `entry`, called `name` in its state, has these `keys`, no others."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is no dictionary but of type {type(entry).__name__}")
    if missing := [key for key in keys if key not in entry]:
        raise ValueError(f"{name} has no {missing[0]}")
    if len(entry) > len(keys):
        other = next(key for key in entry if key not in keys)
        raise ValueError(f"{name} has the unknown entry {shown(other)}")


def check_like(entry: Any, like: Any, name: str) -> None:
    """Raise ValueError unless `entry`, called `name` in its state, can replace `like`.

    It must be a dictionary of the same keys or a list of the same length, of such entries; a tensor
    of the same shape and dtype (see `check_tensor`); None; or a number of the same type, from 0 to
    below 2^53.
    """
    if isinstance(like, dict):
        check_keys(entry, like.keys(), name)
        for key, value in like.items():
            check_like(entry[key], value, f"{name}.{key}")
    elif isinstance(like, list):
        if type(entry) is not list or len(entry) != len(like):
            raise ValueError(f"{name} is not a list of {len(like)} entries")
        for number, (each, value) in enumerate(zip(entry, like, strict=True)):
            check_like(each, value, f"{name}.{number}")
    elif isinstance(like, Tensor):
        check_tensor(entry, name, like)
    elif like is None:
        if entry is not None:
            raise ValueError(f"{name} is not None: {shown(entry)}")
    elif type(entry) is not type(like) or not 0 <= entry < EXACT:
        raise ValueError(f"{name} is not a number from 0 to 2^53: {shown(entry)}")


def check_tensor(entry: Any, name: str, like: Tensor, cast: bool = False) -> None:
    """Raise ValueError unless `entry` is a finite, dense tensor of the shape and dtype of `like`.

    With `cast` it may have any dtype of real numbers that are finite as those of `like`. Of a
    `StoredTensor`, shape and dtype are checked here and its numbers by `loaded`.
    """
    dense = isinstance(entry, Tensor) and entry.layout == torch.strided and not entry.is_meta
    if not dense and not isinstance(entry, StoredTensor):
        raise ValueError(f"{name} is no dense tensor but of type {type(entry).__name__}")
    if entry.shape != like.shape:
        raise ValueError(f"{name} has the shape {tuple(entry.shape)}, not {tuple(like.shape)}")
    if entry.dtype.is_complex if cast else entry.dtype != like.dtype:
        raise ValueError(f"{name} is of {entry.dtype}, not {'real' if cast else like.dtype}")
    if dense:
        _check_finite(entry.to(like.dtype), name)


def loaded(entry: Tensor | StoredTensor, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor `entry`, called `name` in its state, as `dtype`; one that is stored is read.

    Raises:
        ValueError: it is not finite, or damaged.
    """
    tensor = (entry.load() if isinstance(entry, StoredTensor) else entry).to(dtype)
    _check_finite(tensor, name)
    return tensor


def _check_finite(tensor: Tensor, name: str) -> None:
    if tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor.detach()))):
        raise ValueError(f"{name} is not finite")
