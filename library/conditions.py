"""Conditions to sample with: those of random training images."""

import functools
from dataclasses import dataclass

import torch

from datasets import Data
from sources.batch import Conditions
from sources.keyed import keyed_generator


@dataclass(frozen=True)
class ConditionDrawer:
    """Random draw of training images' conditions, read at the first call that needs them.

    Attributes:
        data: whose training split.
        device: of the conditions.
        seed: of the draws.
        class_label: of every row, beside which other conditions are drawn; -1: drawn too.
    """

    data: Data
    device: torch.device
    seed: int = 0
    class_label: int = -1

    def __call__(self, number: int, purpose: str, *key: int) -> Conditions:
        """Rows (number, ...) by name; `purpose` and `key` are those of `keyed_generator`.

        Raises:
            ValueError, OSError: the training images or their conditions cannot be read.
        """
        labels = None
        if self._is_named:
            labels = torch.full((number,), self.class_label, device=self.device)
        if not self.data.condition_names and (self._is_named or not self._classes):
            return Conditions(class_labels=labels)
        try:
            conditions = self._of_training
        except (ValueError, OSError) as error:
            if self._is_named or not self._classes:
                raise
            raise ValueError(f"{error}; sampling.class_label can name a class instead") from error
        generator = keyed_generator("cpu", f"class labels of {purpose}", self.seed, *key)
        rows = torch.arange(len(next(iter(conditions.values()))))
        if (classes_of := conditions.get("class_labels")) is not None:
            rows = rows[classes_of >= 0]  # -1 labels an image that cannot be read
        rows = rows[torch.randint(len(rows), (number,), generator=generator)]
        conditions = conditions.map(lambda condition: condition[rows].to(self.device))
        return conditions if labels is None else conditions | {"class_labels": labels}

    @property
    def _classes(self) -> int:
        return self.data.options.num_classes

    @property
    def _is_named(self) -> bool:
        return bool(self._classes) and self.class_label >= 0

    @functools.cached_property
    def _of_training(self) -> Conditions:
        return self.data.conditions("train", labels=not self._is_named)
