"""Digests of tensors, to tell whether results are of the same ones."""

import hashlib

import torch
from torch import Tensor


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the names and bytes of `tensors`."""
    weights = hashlib.sha256()
    for name, tensor in tensors.items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return weights.hexdigest()


def digests(**tensors: Tensor | None) -> dict[str, str]:
    """SHA-256 of each tensor, by name; None is skipped."""
    return {
        name: hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
        if tensor is not None
    }
