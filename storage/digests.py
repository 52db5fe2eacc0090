"""Digests of tensors, which tell whether results are from the same tensors."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from storage.stored_tensors import StoredTensor


def digest(tensors: Mapping[str, Tensor | StoredTensor]) -> str:
    """SHA-256 of the names and bytes of all `tensors` together."""
    weights = hashlib.sha256()
    for name, tensor in tensors.items():
        weights.update(name.encode())
        tensor = tensor.load() if isinstance(tensor, StoredTensor) else tensor
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return weights.hexdigest()


def digests_of_conditions(conditions: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each condition, by name; that of class labels is called `labels`."""
    names = {"class_labels": "labels"}
    return digests(**{names.get(name, name): rows for name, rows in conditions.items()})


def digests(**tensors: Tensor | None) -> dict[str, str]:
    """SHA-256 of each tensor, by name; None is skipped."""
    return {
        name: hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
        if tensor is not None
    }
