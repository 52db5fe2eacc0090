"""Tensors that belong together, row by row: a batch of images and what comes with them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A base for dataclasses of tensors (B, ...) or None, which are indexed and sliced as one."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: slice | Tensor) -> Self:
        return self.map(lambda rows: rows[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with `change` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v if v is None else change(v) for k, v in values.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self.map(lambda rows: rows.to(device, non_blocking=non_blocking))

    def split(self, size: int) -> list[Self]:
        """Consecutive pieces of `size` rows, and a last one of what is left."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def shard(self, k: int, n: int) -> Self:
        """The k-th of n equal shards; ValueError where the rows cannot be shared equally."""
        size, rest = divmod(len(self), n)
        if rest:
            raise ValueError(f"{len(self)} rows cannot be split evenly into {n} shards")
        return self[k * size : (k + 1) * size]


@dataclass(frozen=True)
class Batch(Rows):
    """Images of a batch and, where there are any, their class and augmentation labels."""

    images: Tensor  # (B, C, H, W); uint8 as a data set gives them, or float
    labels: Tensor | None = None  # (B,), int64
    augment_labels: Tensor | None = None  # (B, 9), of `sources.augmentation`

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What a network is given besides the images, by the names of its arguments."""
        conditions = {"class_labels": self.labels, "augment_labels": self.augment_labels}
        return {name: value for name, value in conditions.items() if value is not None}
