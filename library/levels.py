"""Noise levels of a consistency sampler, chosen for a network and cached beside its checkpoint."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import distributed
from datasets import Data, batch_at
from library.fitting import cached_arrays
from metrics.distances import frechet_distance_of_samples
from reports.progress import progress_bar
from samplers.consistency import ConsistencySampler
from sources.batch import Batch
from sources.keyed import keyed_generator
from storage.run_checkpoints import levels_path

log = logging.getLogger(__name__)

# Samples at each level of the grid: more of small images. With 512 digits in place of 2,048 the
# distance varies more with the draw than with the level.
LEAST_SAMPLES, MOST_SAMPLES = 512, 2048
FEWEST, MOST = 50, 4096  # training images that they are compared with
GRID = 16  # levels
LOWEST, HIGHEST = 0.05, 8.0  # of the grid, for data of standard deviation 0.5


class NoImages(ValueError):
    """Error: the training images cannot be read, or are too few to choose by."""


@dataclass(frozen=True)
class LevelChoice:
    """Choice of the noise levels of a consistency sampler for the weights of a network.

    Levels are chosen greedily, the highest first: each is the level of a grid whose samples have
    the smallest Frechet distance, in pixels, from training images. All candidates use the same
    random numbers. Without training images the sampler has its default levels.

    Attributes:
        sampler: a sampler without levels.
        network: its weights are those of `checkpoint`.
        device: of the network.
        checkpoint: the levels are cached in a file beside it.
        origin: everything that the samples depend on; see `Experiment.origin`.
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
            ValueError: the grid has too few levels for so many evaluations.
            FloatingPointError: a sample is not finite.
        """
        number, grid = self.sampler.n - 1, self._grid()
        if len(grid) < number:
            low, high = self.sampler.method.level_range
            raise ValueError(
                f"between the noise levels {low:g} and {high:g} there are too few to choose "
                f"{number} of: set sampling.levels"
            )
        data = self.data.stored.digest if self.data.stored else self.data.name
        key = self.origin | {"sampling": self.sampler.settings, "samples": self.samples}
        key |= {"grid": grid, "data": data}
        path, spec = levels_path(self.checkpoint, self.sampler.n), {"levels": ("f", (number,))}
        try:
            (levels,) = cached_arrays(path, key, self._choose, spec)
        except NoImages as error:
            if distributed.world() > 1:
                raise
            log.info(f"default sampling.levels, as none can be chosen: {error}")
            return self.sampler.without_fit()
        levels = tuple(levels.tolist())
        words = ", ".join(f"{level:.3g}" for level in levels)
        log.info(f"sampling.levels=({words}), chosen for {self.checkpoint.name}")
        return replace(self.sampler, levels=levels)

    @property
    def samples(self) -> int:
        """Number of samples at each level."""
        dim = math.prod(self.sampler.codec.shape)
        return max(LEAST_SAMPLES, min(MOST_SAMPLES, 2**21 // dim))

    def _grid(self) -> list[float]:
        low, high = self.sampler.method.level_range
        grid = torch.logspace(math.log10(HIGHEST), math.log10(LOWEST), GRID, dtype=torch.float64)
        grid = (grid * self.sampler.scale).tolist()
        return [level for level in grid if low < level < high]

    def _choose(self) -> dict:
        images, grid, number = self._images(), self._grid(), self.sampler.n - 1
        log.info(f"choosing sampling.levels by {self.samples} samples at {len(grid)} noise levels")
        codec = self.sampler.codec
        real = codec.comparable(codec.units(images.images)).flatten(1).cpu().numpy()
        levels: list[float] = []
        with progress_bar(total=len(grid) * number, desc="levels") as progress:
            while len(levels) < number:
                start = grid.index(levels[-1]) + 1 if levels else 0
                rest = number - len(levels) - 1  # levels below the one that is chosen now
                candidates, distances = grid[start : len(grid) - rest], []
                for level in candidates:
                    fake = self._samples((*levels, level), images)
                    distances.append(frechet_distance_of_samples(real, fake))
                    progress.update()
                levels.append(candidates[distances.index(min(distances))])
        return {"levels": np.array(levels)}

    def _images(self) -> Batch:
        """Random training images, of the class of the samples where these have one."""
        try:
            train = self.data.get("train")
        except (ValueError, OSError) as error:
            raise NoImages(str(error)) from error
        rows, label = torch.arange(len(train)), self.sampler.class_label
        if label >= 0:
            rows = rows[train.labels == label]
        if len(rows) < FEWEST:
            raise NoImages(f"{len(rows)} training images are fewer than {FEWEST}")
        generator = keyed_generator("cpu", "images for levels", self.seed)
        rows = rows[torch.randperm(len(rows), generator=generator)[:MOST]]
        return batch_at(train, rows)

    def _samples(self, levels: tuple[float, ...], images: Batch) -> NDArray:
        """Pixels (n, K) of samples with the conditions of `images`, again and again."""
        generator = keyed_generator(self.device, "samples for levels", self.seed)
        sampler, samples = replace(self.sampler, n=len(levels) + 1, levels=levels), []
        for part in images[torch.arange(self.samples) % len(images)].split(sampler.batch_size):
            conditions = part.conditions.map(lambda rows: rows.to(self.device))
            batch, _ = sampler(self.network, len(part), generator=generator, conditions=conditions)
            samples.append(sampler.codec.comparable(batch).flatten(1).cpu().numpy())
        return np.concatenate(samples)
