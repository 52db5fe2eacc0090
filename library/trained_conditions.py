"""The conditions of what a trained network draws: class labels, and others by name."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.keys import shown
from experiment_parts import Parts
from sources.batch import Conditions
from sources.keyed import keyed_generator
from sources.labels import number_of

ClassLabel = int | str | Sequence[int | str] | Tensor | None
OtherConditions = Mapping[str, Tensor] | None  # conditions besides class labels

NO_CONDITION = (
    "the network is given an image as the condition of each sample, and none is named: set "
    "sampling.condition (--mode sample), or pass condition= (the library's sample)"
)


class Conditioned:
    """Conditions of images for the network of an `experiment`.

    Attributes:
        experiment: the config's `experiment.Experiment`.
        class_names: by class number; empty where the classes have no names.
    """

    def __init__(self, experiment: Parts):
        self.experiment = experiment
        self.class_names = experiment.data.class_names

    @property
    def condition_names(self) -> list[str]:
        """Names of the conditions besides class labels that the network is given."""
        images = ["image"] * (self.experiment.condition_codec is not None)
        return list(dict.fromkeys(self.experiment.data.condition_names + images))

    def encoded_condition(self, condition: Tensor, n: int) -> Tensor:
        """The row `image` (n, C, H, W) of `conditions`, as the network is given it.

        `condition` is one image (C, H, W) for all or one for each (n, C, H, W), in its own units:
        floats in [0, 1] for 8-bit images, the numbers of arrays.

        Raises:
            ValueError: it has another shape, or is not finite or outside its range.
        """
        codec = self.experiment.condition_codec
        if codec is None:
            raise ValueError("the network is given no condition (data.condition_path)")
        condition = torch.as_tensor(condition)
        shape = tuple(codec.data_shape)
        if condition.shape[-3:] != shape or condition.shape[:-3] not in ((), (1,), (n,)):
            raise ValueError(
                f"condition must be one image {shape} (C, H, W), or one for each of {n} samples, "
                f"not {tuple(condition.shape)}"
            )
        try:
            codec.check(condition)
        except ValueError as error:
            raise ValueError(f"condition: {error}") from error
        rows = codec.encode(condition.to(self.experiment.device, codec.precision))
        return rows.expand(n, *shape)

    def labels(
        self, class_label: ClassLabel, n: int, seeds: Sequence[int] | None = None
    ) -> Tensor | None:
        """Class labels (n,) of n images: `class_label`, else the config's, else drawn by `seeds`.

        None where the network has no classes. Raises ValueError for a label that is no class.
        """
        classes, default = self.experiment.classes, self.experiment.sampler.class_label
        if class_label is None and not classes:
            return None
        if class_label is None:
            class_label = default
            if default < 0 and seeds is not None:
                draws = (keyed_generator("cpu", "class", seed) for seed in seeds)
                class_label = [torch.randint(classes, (), generator=g).item() for g in draws]
        labels = self._numbers_of(class_label)
        if labels.dtype.kind not in "iu" or labels.shape not in ((), (n,)):
            raise ValueError(f"class_label must be the number or name of a class, or {n} of them")
        least = -1 if classes and self.experiment.objective.label_dropout else 0
        if ((labels < least) | (labels >= classes)).any():
            has = f"those from {least} to {classes - 1}" if classes else "none (data.num_classes=0)"
            raise ValueError(
                f"class_label={shown(class_label)} is no class of the network: it has {has}"
            )
        return torch.from_numpy(labels.astype(np.int64)).to(self.experiment.device).expand(n)

    def conditions_of(
        self, class_label: ClassLabel, n: int, others: OtherConditions = None
    ) -> Conditions:
        """The conditions of n images: class labels, and `others`.

        Raises:
            ValueError: as of `labels`, or `others` are not those of `data.conditions`.
        """
        conditions = self._checked(others, n)
        missing = [each for each in self.condition_names if each not in conditions]
        if missing:
            raise ValueError(
                f"the network takes {', '.join(missing)} of each image (data.conditions), which is "
                "not known here: give the library's conditions={name: rows}"
            )
        return conditions | {"class_labels": self.labels(class_label, n)}

    def _numbers_of(self, class_label: ClassLabel) -> NDArray:
        """`class_label` as an array, with numbers in place of names."""
        if isinstance(class_label, Tensor):
            return class_label.cpu().numpy()
        if isinstance(class_label, str):
            return np.asarray(number_of(class_label, self.class_names))
        if np.ndim(class_label):
            names = self.class_names
            class_label = [number_of(c, names) if isinstance(c, str) else c for c in class_label]
        labels = np.asarray(class_label)
        return labels if labels.size else labels.astype(np.int64)

    def _checked(self, others: OtherConditions, n: int) -> Conditions:
        """`others` on the device; ValueError unless they are n rows each of `data.conditions`."""
        names = self.condition_names
        for name, rows in (others or {}).items():
            if name not in names or len(rows) != n:
                form = f"{n} rows of each of {', '.join(names)}" if names else "empty"
                raise ValueError(
                    f"conditions, without class labels, must be {form} (data.conditions), not "
                    f"{len(rows)} rows of {name}"
                )
        return Conditions(others or {}).map(lambda rows: rows.to(self.experiment.device))

    def _conditions(
        self, class_label: ClassLabel, seeds: Sequence[int], others: OtherConditions
    ) -> Conditions:
        """Conditions of an image for each seed.

        Class labels come from `labels`, conditions that are not among `others` from a training
        image drawn by the seed.
        """
        labels = {"class_labels": self.labels(class_label, len(seeds), seeds)}
        conditions = self._checked(others, len(seeds)) | labels
        if self.experiment.condition_codec and "image" not in conditions:
            raise ValueError(NO_CONDITION)
        if conditions.keys() >= {*self.condition_names} or not seeds:
            return conditions
        of_training = self.experiment.data.conditions("train", labels=False)
        number = len(next(iter(of_training.values())))
        draws = (keyed_generator("cpu", "conditions", seed) for seed in seeds)
        rows = torch.cat([torch.randint(number, (1,), generator=draw) for draw in draws])
        return of_training.map(lambda each: each[rows].to(self.experiment.device)) | conditions
