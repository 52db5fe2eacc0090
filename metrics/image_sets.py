"""The sides of `metrics.compare`: images of a folder, zip or array file, or a statistics file."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray
from tqdm import tqdm

from metrics.features import EXTRACTED_AT_ONCE, FeatureSpace
from metrics.reference import FEATURES_KEPT, Reference, read_reference
from sources import arrays, folder
from sources.base import Classes, Source, Unreadable
from sources.sizes import shapes_of
from storage.files import read_arrays

log = logging.getLogger(__name__)

MEASURED = 64  # images that tell whether any has colours
ROUND = re.compile(r"samples_(\d+)\.npz")  # of samples, in the folder of an evaluation


@dataclass(frozen=True)
class Images:
    """The images of `parts` in their order, uint8, all of one `shape` (H, W, C)."""

    path: Path
    parts: list[Source]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def classes(self) -> Classes | None:
        """Class labels of all images; None where one has none."""
        try:
            parts = [part.classes() for part in self.parts]
        except (ValueError, AttributeError):  # the latter of a source that never has any
            return None
        return Classes(np.concatenate([part.labels for part in parts]), parts[0].names)

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """All images, (n, H, W, C) at a time; ValueError where one has another shape or type."""
        rows: list[NDArray] = []
        for part in self.parts:
            for i in range(len(part)):
                try:
                    rows.append(self._checked(np.asarray(part[i]), i))
                except Unreadable as error:
                    raise ValueError(f"{self.path}: {error}") from error
                if len(rows) == EXTRACTED_AT_ONCE:
                    yield np.stack(rows)
                    rows.clear()
        if rows:
            yield np.stack(rows)

    def _checked(self, image: NDArray, i: int) -> NDArray[np.uint8]:
        if image.dtype != np.uint8:
            raise ValueError(
                f"{self.path} holds {image.dtype} arrays; only images of 8 bits are compared here, "
                "arrays by an evaluation of a run"
            )
        if image.shape != self.shape:
            raise ValueError(
                f"{self.path}: image number {i} is {in_words(image.shape)}, the first "
                f"{in_words(self.shape)}; only images of one size are compared"
            )
        return image


@dataclass(frozen=True)
class ImageSet:
    """One of the two sides: `images`, or `statistics` as stored; some files of ADM have both."""

    path: Path
    images: Images | None
    statistics: dict[str, NDArray]

    @classmethod
    def open(cls, path: Path, data: ConfigDict) -> "ImageSet":
        """The images or statistics at `path`; `data` are the options of a data set.

        Raises ValueError or OSError, in one line, where there is neither.
        """
        if not (path.is_file() and path.suffix.lower() == ".npz"):
            return cls(path, _open_images(path, data), {})
        shapes = arrays.shapes(path)
        names = [name for name, shape in shapes.items() if len(shape) < 3]
        if len(names) == len(shapes):
            return cls(path, None, read_arrays(path))
        of_moments = [name for name in ("mu", "sigma") if name in names]
        statistics = read_arrays(path, of_moments) if len(of_moments) == 2 else {}
        return cls(path, _open_images(path, data), statistics)

    def __len__(self) -> int:
        """The number of images; 0 where it is not known."""
        return len(self.images) if self.images else int(self.statistics.get("count", 0))

    def reference(self, space: FeatureSpace | None, identity: dict[str, str]) -> Reference:
        """The features in `space`, None where both sides are statistics.

        Stored moments take the place of those of the images, as in ADM's evaluator, where they have
        as many features as the space.
        """
        if self.images is None:
            return read_reference(self.path, self.statistics, space, identity)
        blocks = (space(images)[0] for images in self._watched(space))
        measured = Reference.measure(blocks, len(self), FEATURES_KEPT)
        if self.statistics and len(self.statistics["mu"]) == space.width:
            stored = read_reference(self.path, self.statistics, space, identity)
            log.info(f"{self.path}: the moments are those stored in the file, not of its images")
            return replace(measured, gaussian=stored.gaussian, complete=False)
        return measured

    def features(self, space: FeatureSpace) -> tuple[NDArray, NDArray | None]:
        """Features (n, K) of all images in their order, and logits where the space has any."""
        features, logits = zip(*map(space, self._watched(space)), strict=True)
        return np.concatenate(features), None if logits[0] is None else np.concatenate(logits)

    def _watched(self, space: FeatureSpace) -> Iterator[NDArray[np.uint8]]:
        title = f"{self.path.name}, {space.label}"
        with tqdm(total=len(self), desc=title, unit="image", leave=False, delay=1) as progress:
            for block in self.images.blocks():
                yield block
                progress.update(len(block))


def _open_images(path: Path, data: ConfigDict) -> Images:
    """The images at `path`, of a data set with a test split the training images."""
    rounds = {}
    if path.is_dir():
        matches = [match for name in path.iterdir() if (match := ROUND.fullmatch(name.name))]
        rounds = {int(match[1]): path / match[0] for match in matches}
    places = [rounds[r] for r in sorted(rounds)] or [path]
    parts = [_open(place, data, channels=0) for place in places]
    first, *others = shapes_of(parts[0], MEASURED)
    channels = max(shape[2] for shape in (first, *others))
    if any(shape[2] != channels for shape in others) or first[2] != channels:
        parts = [_open(place, data, channels) for place in places]
    return Images(path, parts, (*first[:2], channels))


def _open(path: Path, data: ConfigDict, channels: int) -> Source:
    options = data.copy_and_resolve_references()
    options.update(path=str(path), num_channels=channels, image_size=0, held_out=0)
    listed = folder.find(options)
    if listed.split_names and not channels:
        log.info(f"{path}: images of {listed.split_names['train']}, not those of the test split")
    return listed.open(options, "train")


def in_words(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
