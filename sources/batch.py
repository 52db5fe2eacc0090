"""Tensors that belong together, row by row: a batch of images and what comes with them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A base for dataclasses of tensors (B, ...), `Conditions` or None, indexed as one."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: slice | Tensor) -> Self:
        return self.map(lambda rows: rows[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The rows with `change` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {
            name: value.map(change) if isinstance(value, Conditions) else change(value)
            for name, value in values.items()
            if value is not None
        }
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self.map(lambda rows: rows.to(device, non_blocking=non_blocking))

    def split(self, size: int) -> list[Self]:
        """Consecutive pieces of `size` rows; the last one may be smaller."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def shard(self, k: int, n: int) -> Self:
        """The k-th of n equal shards; ValueError where the rows cannot be shared equally."""
        size, rest = divmod(len(self), n)
        if rest:
            raise ValueError(f"{len(self)} rows cannot be split evenly into {n} shards")
        return self[k * size : (k + 1) * size]


class Kind(NamedTuple):
    """A kind of condition."""

    none: float  # value of the entries of a row without a condition
    dropout: str = "label"  # training.{dropout}_dropout drops rows, to learn without them too
    spatial: bool = False  # mirrored, cut and transformed as the image is


# The name under which a network takes a condition -> its kind.
KINDS: dict[str, Kind] = {
    "class_labels": Kind(none=-1),  # (B,), int64
    "augment_labels": Kind(none=0, dropout=""),  # (B, 9), from `sources.augmentation`
    "vector": Kind(none=0),  # (B, K)
    "image": Kind(none=0, dropout="condition", spatial=True),  # (B, C, H, W)
}


class Conditions(Mapping[str, Tensor]):
    """Arguments of a network besides x and the noise label: rows (B, ...) by name (`KINDS`)."""

    def __init__(self, rows: Mapping[str, Tensor | None] = {}, /, **more: Tensor | None):  # noqa: B006
        rows = {**rows, **more}
        self.rows = {name: row for name, row in rows.items() if row is not None}

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __or__(self, other: Mapping[str, Tensor | None]) -> "Conditions":
        return Conditions({**self, **other})

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        """The conditions with `change` applied to the tensor of each."""
        return Conditions({name: change(row) for name, row in self.items()})

    def droppable(self, dropout: str = "label") -> bool:
        """True if `drop` changes any condition."""
        return any(KINDS[name].dropout == dropout for name in self)

    def drop(self, mask: Tensor, dropout: str = "label") -> "Conditions":
        """The conditions without the rows of `mask` (B,), bool, for kinds of this `dropout`."""

        def dropped(name: str, row: Tensor) -> Tensor:
            at = mask.view(-1, *[1] * (row.dim() - 1))
            kind = KINDS[name]
            return row.masked_fill(at, kind.none) if kind.dropout == dropout else row

        return Conditions({name: dropped(name, row) for name, row in self.items()})


@dataclass(frozen=True)
class Batch(Rows):
    """Images of a batch, (B, C, H, W), as a data set stores them or float; and conditions."""

    images: Tensor
    conditions: Conditions = field(default_factory=Conditions)

    @property
    def labels(self) -> Tensor | None:
        """Class labels (B,), int64; None where there are none."""
        return self.conditions.get("class_labels")

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The batch with `move` applied to the images and to spatial conditions (B, C, H, W)."""
        spatial = {n: move(rows) for n, rows in self.conditions.items() if KINDS[n].spatial}
        return replace(self, images=move(self.images), conditions=self.conditions | spatial)
