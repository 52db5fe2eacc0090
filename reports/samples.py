"""Samples in files of a folder, one for each seed, written whole or not at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reports.images import Images, visible
from sources.folder import read_images
from storage.files import check_arrays, read_arrays, save_npz, save_png


@dataclass(frozen=True)
class SampleFiles:
    """The samples of seeds in `folder`, each of the `shape` (H, W, C) and of type `dtype`.

    {seed}.png holds a sample of 8 bits of 1 or 3 channels. Of others it is a picture for the eye,
    as `pictures` makes them (n, H, W, C) of n samples, and {seed}.npz has the sample.
    """

    folder: Path
    shape: tuple[int, int, int]
    dtype: str = "uint8"
    pictures: Callable[[NDArray], Images] = np.asarray

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Seeds without a sample yet."""
        return [seed for seed in seeds if not self._path(seed).exists()]

    def save(self, seed: int, sample: NDArray) -> None:
        """Write the sample of `seed`; OSError, which names the file, where it cannot."""
        save_png(self._named(seed, "png"), visible(self.pictures(sample[None]))[0])
        if not self._is_picture:
            save_npz(self._path(seed), sample=sample)

    def read(self, seeds: Sequence[int]) -> NDArray:
        """The samples (n, H, W, C) of `seeds`; ValueError where one is damaged."""
        try:
            return np.stack([self._read(self._path(seed)) for seed in seeds])
        except ValueError as error:
            raise ValueError(f"{error}: remove it, and it is drawn again") from error

    def _read(self, path: Path) -> NDArray:
        if not self._is_picture:
            spec = {"sample": (np.dtype(self.dtype).kind, self.shape)}
            return check_arrays(path, read_arrays(path), spec)["sample"].astype(self.dtype)
        (sample,) = read_images("--outdir", str(path), self.shape[2]).values()
        if sample.shape != self.shape:
            raise ValueError(f"{path} has the shape {sample.shape}, the samples {self.shape}")
        return sample

    @property
    def _is_picture(self) -> bool:
        return self.dtype == "uint8" and self.shape[2] in (1, 3)

    def _path(self, seed: int) -> Path:
        return self._named(seed, "png" if self._is_picture else "npz")

    def _named(self, seed: int, suffix: str) -> Path:
        return self.folder / f"{seed:06d}.{suffix}"
