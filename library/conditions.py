"""Conditions to sample with: those of random training images."""

import functools
from dataclasses import dataclass

import torch

from datasets import Data
from methods.base import Method
from sources.batch import Conditions
from sources.codec import Codec
from sources.keyed import keyed_generator


def check_conditions(method: Method, codec: Codec) -> None:
    """Raise ValueError where a network of `method` cannot be given an image as a condition."""
    if method.uses_reference_batch:
        raise ValueError(
            f"data.condition_path: the targets of {method.name} here are means over images of "
            "other conditions: use training.sde='pfgmpp' with training.target='image' (model.D=1 "
            "is the field of a Poisson flow)"
        )
    method.check_kernel("data.condition_path")
    if codec.shape != codec.data_shape:
        raise ValueError(
            "data.condition_path: conditions have the sides of the images, and the network sees "
            f"latents of the shape {codec.shape} (data.codec)"
        )


@dataclass(frozen=True)
class ConditionDrawer:
    """Random draws of training images' conditions, which are read when first needed.

    Attributes:
        data: its training split is used.
        device: of the conditions.
        seed: of the draws.
        class_label: the label of every row; conditions of `data.condition_path` are then drawn from
            the images of this class. -1: labels are drawn too.
    """

    data: Data
    device: torch.device
    seed: int = 0
    class_label: int = -1

    def __call__(self, number: int, purpose: str, *key: int) -> Conditions:
        """Rows (number, ...) by name; `purpose` and `key` are those of `keyed_generator`.

        Raises:
            ValueError, OSError: the training images or their conditions cannot be read, or no image
                is of the class.
        """
        labels = None
        if self._is_named:
            labels = torch.full((number,), self.class_label, device=self.device)
        self._check_image()
        if not self._reads_rows and not self.data.has_pairs:
            return Conditions(class_labels=labels)
        conditions = self._of_training if self._reads_rows else Conditions()
        rows = torch.arange(self.data.number("train"))
        if (classes_of := conditions.get("class_labels")) is not None:
            # the label -1 marks an image that cannot be read
            rows = rows[classes_of == self.class_label if self._is_named else classes_of >= 0]
            if not len(rows):
                raise ValueError(
                    f"sampling.class_label={self.class_label}: no training image is of this class, "
                    "so there are no conditions (data.condition_path) to draw samples with"
                )
        generator = keyed_generator("cpu", f"class labels of {purpose}", self.seed, *key)
        rows = rows[torch.randint(len(rows), (number,), generator=generator)]
        conditions = conditions.map(lambda condition: condition[rows].to(self.device))
        if self.data.has_pairs:
            conditions |= {"image": self.data.paired("train", rows).to(self.device)}
        return conditions if labels is None else conditions | {"class_labels": labels}

    def _check_image(self) -> None:
        if self.data.options.condition_channels and not self.data.has_pairs:
            raise ValueError(
                "the network is given an image as a condition, and data.condition_path names none"
            )

    @property
    def _reads_rows(self) -> bool:
        """True where conditions of all training images are read."""
        return bool(self.data.condition_names or self._reads_labels)

    @property
    def _reads_labels(self) -> bool:
        return bool(self._classes and (self.data.has_pairs or not self._is_named))

    @property
    def _classes(self) -> int:
        return self.data.options.num_classes

    @property
    def _is_named(self) -> bool:
        return bool(self._classes) and self.class_label >= 0

    @functools.cached_property
    def _of_training(self) -> Conditions:
        try:
            return self.data.conditions("train", labels=self._reads_labels)
        except (ValueError, OSError) as error:
            if self._is_named or not self._classes:
                raise
            raise ValueError(f"{error}; sampling.class_label can name a class instead") from error
