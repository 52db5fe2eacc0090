"""A look at the data before training: what a network would see, and what a step would cost."""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import distributed
import execution
from datasets import SPLITS, DataSet, keyed_generator, shuffled_batches
from experiment_parts import Parts
from library.posterior import condition_pictures
from library.step_cost import estimate
from library.training_run import TrainingRun
from reports.data_page import ClassCount, Look, Values, render
from reports.images import by_class, channels_last, class_rows, image_grid
from sources.batch import Batch
from sources.preparation import Preparation
from storage.files import atomic_write
from training import TrainState

log = logging.getLogger(__name__)

PICTURED, COLUMNS = 64, 8  # images of the page's picture, in a row of it; of pairs half as many
VALUES = 2**18  # of a histogram


@dataclass(frozen=True)
class FirstLook:
    """The data of a training, and its first step.

    Attributes:
        experiment: has the data and the network.
        train, test: the data.
        prepare: what a step does to a batch.
        state: what a step changes; it is thrown away.
        seed: of the training.
    """

    experiment: Parts
    train: DataSet
    test: DataSet
    prepare: Preparation
    state: TrainState
    seed: int

    @classmethod
    def from_config(cls, config, experiment: Parts) -> Self:
        """Read the data of `experiment`, which is that of `config`; raises as `datasets.Data`."""
        device, data = experiment.device, experiment.data
        execution.check_precision(config.training.precision, device)
        execution.prepare_process(config.training.precision, device)
        state = TrainingRun.from_config(config, experiment, Path(), {}).state
        train, test = data.get("train").to(device), data.get("test")
        return cls(experiment, train, test, experiment.preparation, state, config.seed)

    @property
    def line(self) -> str:
        """The line of the log on the data."""
        return self.experiment.data.describe(self.train, self.test, self.prepare.words)

    def save(self, path: Path, title: str) -> None:
        """Write the page, headed `title`, to `path`, in the main process only.

        It takes some training steps. OSError, which names the path, where it cannot be written.
        """
        page = self._page(title)
        self.experiment.data.close()
        if distributed.is_main():
            with atomic_write(path) as file:
                file.write(page.encode(errors="backslashreplace"))
            log.info(f"page: {path}")

    def _page(self, title: str) -> str:
        experiment, data = self.experiment, self.experiment.data
        stored = self._batch(self.train, PICTURED)
        prepared = self.prepare(stored, self._generator())
        training_set, prepare = experiment.training_set(self.train)
        batch = self._batch(training_set, experiment.objective.batch_size)
        cost = estimate(self.state, batch, prepare, self._generator())
        channels, height, width = experiment.codec.data_shape
        parameters = sum(p.numel() for p in experiment.network.parameters())
        facts = {
            "data": data.name,
            "images": f"{len(self.train):,} to train on, {len(self.test):,} to test on",
            "splits": data.split_words or "those of the data set",
            "size": f"{height} × {width}, {channels} channel{'s' * (channels > 1)}",
            "input of the network": " × ".join(map(str, experiment.codec.shape)),
            "parameters": f"{parameters:,}",
            "training images": self.prepare.words,
        }
        grid, caption, rows = self._grid(prepared)
        look = Look(
            line=self.line,
            facts=facts,
            estimates=cost.words,
            grid=grid,
            caption=caption,
            rows=rows,
            values=[
                _values("stored", stored.images),
                _values("encoded", prepared.images),
                *self._values_of_conditions(prepared),
            ],
            classes=self._counts(),
        )
        return render(title, look)

    def _grid(self, batch: Batch) -> tuple[bytes, str, list[str]]:
        """A PNG of the images of `batch` in the order of their classes, its caption, its rows.

        The conditions of pairs stand beside the images.
        """
        experiment, names, columns = self.experiment, [], None
        batch = batch[: PICTURED // 2] if experiment.condition_codec else batch
        pictures = channels_last(experiment.codec.show(batch.images))
        caption = "Training images as a step gets them, before noise is added"
        if condition := experiment.condition_codec:
            stored = condition.stored(condition.unclamped(batch.conditions["image"]))
            beside = condition_pictures(stored, condition, experiment.codec)
            pictures, columns = np.concatenate([pictures, beside], 2), COLUMNS // 2
            caption += ", each with its condition on its right"
        if experiment.classes:
            labels = batch.labels.cpu().numpy()
            if classes := class_rows(experiment.classes, -1):
                names, columns = self._class_names, columns or COLUMNS
                pictures = by_class(pictures, labels, classes, columns)
            else:
                pictures = pictures[labels.argsort(kind="stable")]
            caption += ", in the order of their classes"
        grid = io.BytesIO()
        Image.fromarray(image_grid(pictures, columns)).save(grid, "png")
        return grid.getvalue(), f"{caption}.", names

    def _values_of_conditions(self, batch: Batch) -> list[Values]:
        """Numbers of the conditions but class labels: of `batch`, or of all training images."""
        conditions = self.experiment.data.conditions("train", labels=False)
        values = [_values(name, rows, "Of all images") for name, rows in conditions.items()]
        if self.experiment.condition_codec:
            values.append(_values("condition", batch.conditions["image"]))
        return values

    def _batch(self, data: DataSet, size: int) -> Batch:
        batch = next(shuffled_batches(data, size, self.seed))
        return batch.to(self.experiment.device)

    def _generator(self) -> torch.Generator:
        return keyed_generator(self.experiment.device, "training", self.seed, 0)

    def _counts(self) -> list[ClassCount]:
        """Numbers of images of each class; [] without classes."""
        classes, data = self.experiment.classes, self.experiment.data
        if not classes:
            return []
        counts = [data.labels(split).bincount(minlength=classes).tolist() for split in SPLITS]
        return [ClassCount(*each) for each in zip(self._class_names, *counts, strict=False)]

    @property
    def _class_names(self) -> list[str]:
        return [*(getattr(self.train, "names", ()) or map(str, range(self.experiment.classes)))]


def _values(name: str, images: Tensor, *caption: str) -> Values:
    """Numbers of each channel of `images` (n, C, ...), and a sample of all of them."""
    channels = images.detach().double().cpu().transpose(0, 1).flatten(1).numpy()
    everything = channels.ravel()
    spread = np.linspace(0, everything.size - 1, min(everything.size, VALUES)).astype(int)
    rows = [(each.min(), each.max(), each.mean(), each.std()) for each in channels]
    return Values(name, everything[spread], rows, *caption)
