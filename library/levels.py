"""Noise levels of a consistency sampler, chosen for a network and kept beside its checkpoint."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets import Data, batch_at, to_unit_interval
from library.fitting import cached_arrays
from metrics.distances import frechet_distance_of_samples
from reports.progress import progress_bar
from samplers.consistency import ConsistencySampler
from sources.batch import Batch
from sources.keyed import keyed_generator
from storage.run_checkpoints import levels_path

log = logging.getLogger(__name__)

SAMPLES = 512  # that are compared with as many training images, at each level of the grid
GRID = 16  # levels
LOWEST, HIGHEST = 0.05, 8.0  # of the grid


@dataclass(frozen=True)
class LevelChoice:
    """Choice of the noise levels of a consistency sampler for the weights of a network.

    Levels are chosen greedily, the highest first: each is the level of a grid whose samples have
    the smallest Frechet distance, in pixels, from training images. All candidates use the same
    random numbers.

    Attributes:
        sampler: a sampler without levels.
        network: its weights are those of `checkpoint`.
        device: of the network.
        checkpoint: the levels are cached in a file beside it.
        origin: everything that the choice depends on; see `Experiment.origin`.
        seed: of the random numbers.
        data: the source of the training images.
    """

    sampler: ConsistencySampler
    network: nn.Module
    device: torch.device
    checkpoint: Path
    origin: dict
    seed: int
    data: Data

    def fitted(self) -> ConsistencySampler:
        """The sampler with the chosen levels.

        Raises:
            ValueError, OSError: the training images cannot be read.
            FloatingPointError: a sample is not finite.
        """
        key = self.origin | {"sampling": self.sampler.settings, "samples": SAMPLES}
        path = levels_path(self.checkpoint, self.sampler.n)
        spec = {"levels": ("f", (self.sampler.n - 1,))}
        (levels,) = cached_arrays(path, key, self._choose, spec)
        levels = tuple(levels.tolist())
        words = ", ".join(f"{level:.3g}" for level in levels)
        log.info(f"sampling.levels=({words}), chosen for {self.checkpoint.name}")
        return replace(self.sampler, levels=levels)

    def _choose(self) -> dict:
        log.info(f"choosing sampling.levels by {SAMPLES} samples at {GRID} noise levels")
        images = self._images()
        real = to_unit_interval(images.images).flatten(1).cpu().numpy()
        low, high = self.sampler.level_range
        grid = torch.logspace(math.log10(HIGHEST), math.log10(LOWEST), GRID, dtype=torch.float64)
        grid = [level for level in grid.tolist() if low < level < high]
        levels: list[float] = []
        with progress_bar(total=len(grid) * (self.sampler.n - 1), desc="levels") as progress:
            while len(levels) < self.sampler.n - 1:
                candidates = [level for level in grid if not levels or level < levels[-1]]
                distances = []
                for level in candidates:
                    samples = self._samples((*levels, level), images)
                    fake = samples.flatten(1).cpu().numpy()
                    distances.append(frechet_distance_of_samples(real, fake))
                    progress.update()
                levels.append(candidates[distances.index(min(distances))])
        return {"levels": torch.tensor(levels, dtype=torch.float64).numpy()}

    def _images(self) -> Batch:
        try:
            train = self.data.get("train")
        except (ValueError, OSError) as error:
            raise type(error)(f"{error}; sampling.levels can be set instead") from error
        rows, label = torch.arange(len(train)), self.sampler.class_label
        if label >= 0:
            rows = rows[train.labels == label]
        generator = keyed_generator("cpu", "images for levels", self.seed)
        rows = rows[torch.randperm(len(rows), generator=generator)[:SAMPLES]]
        return batch_at(train, rows)

    def _samples(self, levels: tuple[float, ...], images: Batch) -> Tensor:
        generator = keyed_generator(self.device, "samples for levels", self.seed)
        sampler = replace(self.sampler, n=len(levels) + 1, levels=levels)
        conditions = images.conditions.map(lambda rows: rows.to(self.device))
        samples, _ = sampler(self.network, len(images), generator=generator, conditions=conditions)
        return samples
