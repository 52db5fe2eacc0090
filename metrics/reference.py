"""Statistics of the data with which samples are compared: measured once, and kept."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import datasets
import distributed
from metrics.distances import Gaussian
from metrics.features import EXTRACTED_AT_ONCE, FeatureSpace, get_features
from sources import digests
from storage.files import check_arrays, read_arrays, save_npz

log = logging.getLogger(__name__)

FEATURES_KEPT = 50_000  # of the data's images, for what needs more than their moments


@dataclass(frozen=True)
class Reference:
    """The features of the data that samples are compared with.

    `gaussian` is that of all of them. `features` (m, K) are kept for at most so many images, in
    random order, and `index` (m,) says which images they are of; statistics that were published
    may lack either. `complete` says that `features` are those of all images.
    """

    gaussian: Gaussian
    features: NDArray | None = None
    index: NDArray | None = None
    complete: bool = False

    def names_images_of(self, data) -> bool:
        """Whether `index` says for all of `features` which image of `data` they are of."""
        if self.features is None or self.index is None or self.index.dtype.kind != "i":
            return False
        within = (self.index >= 0) & (self.index < len(data))
        return self.index.shape == self.features.shape[:1] and bool(within.all())

    @classmethod
    def measure(cls, blocks: Iterable[NDArray], count: int, keep: int) -> "Reference":
        """From features of `count` images that come in blocks (n_i, K), `keep` of them kept."""
        index = np.random.default_rng(0).permutation(count)[:keep]
        chosen = np.isin(np.arange(count), index)
        kept = []

        def keeping() -> Iterator[NDArray]:
            start = 0
            for block in blocks:
                kept.append(block[chosen[start : start + len(block)]])
                start += len(block)
                yield block

        gaussian = Gaussian.fit_blocks(keeping())
        features = np.concatenate(kept)[np.argsort(np.argsort(index))]  # from the data's order
        return cls(gaussian, features, index, complete=len(index) == count)


@dataclass
class ReferenceStatistics:
    """What samples are compared with, in which space, and where it is kept.

    `data` is the training split, and `path` where its statistics are kept; both are None where
    published statistics stand for it. `reference` is None until the data are measured.
    """

    space: FeatureSpace
    reference: Reference | None
    data: Tensor | datasets.Labelled | datasets.Stream | None = None
    path: Path | None = None

    @classmethod
    def build(
        cls, config, device: torch.device, source: datasets.Data | None = None
    ) -> "ReferenceStatistics":
        """Raises ValueError, in one line, for what cannot be loaded or does not fit.

        `source` gives the data; None: those that `config` names.
        """
        space, folder = get_features(config, device), Path(config.eval.stats_dir)
        needed, number = space.width + 1, config.eval.num_samples
        if number < needed:
            log.warning(
                f"eval.num_samples={number} is too few for a covariance of {space.width} features, "
                f"which needs {needed}: the Frechet distance is biased, and not one to quote"
            )
        size, name = config.data.image_size, data_name(config)
        for published in (folder / f"{name}_{size}_stats.npz", folder / f"{name}_stats.npz"):
            if published.exists():
                log.info(f"statistics of the data: {published}, which names no training images")
                return cls(space, replace(_read_statistics(published, space), index=None))
        source = source or datasets.Data(config)
        try:
            data = source.get("train")
        except ValueError:  # a network with class labels can be sampled without those of the data
            data = source.get("train", labels=False)
        shape = f"{size}x{size}x{config.data.num_channels}"
        path = folder / f"{name}_train_{shape}_{space.name}_{fingerprint(data)}.npz"
        reference = _read_statistics(path, space) if path.exists() else None
        if reference and not reference.names_images_of(data):
            raise ValueError(f"{path} does not say which images its features are of; delete it")
        return cls(space, reference, data, path)

    @property
    def labels(self) -> NDArray | None:
        """The class labels (m,) of the features of the reference, where they are known."""
        known = getattr(self.data, "labels", None)
        return None if known is None else known.cpu().numpy()[self.reference.index]

    def measure(self, progress: Callable[[int], object]) -> None:
        """Computes the statistics of the data and keeps them; `progress` hears of image counts."""

        def blocks() -> Iterator[NDArray]:
            for batch in datasets.in_order(self.data, EXTRACTED_AT_ONCE):
                yield self.space(batch.images.permute(0, 2, 3, 1).cpu().numpy())[0]
                progress(len(batch))

        count = len(self.data)
        self.reference = found = Reference.measure(blocks(), count, FEATURES_KEPT)
        gaussian = {"mu": found.gaussian.mean, "sigma": found.gaussian.covariance}
        # evaluations of two workdirs may measure the same data at the same time
        own = self.path.with_suffix(f".{os.getpid()}.npz")
        kept = {"pool_3": found.features, "index": found.index, "count": count}
        save_npz(own, **gaussian, **kept)
        own.replace(self.path)
        log.info(f"statistics of the data: {self.path}")


def data_name(config) -> str:
    """Of files: the data set, with its category where it has several."""
    category = config.data.get("category")
    return config.data.dataset.lower() + (f"_{category}" if category else "")


def fingerprint(data: Tensor | datasets.Labelled | datasets.Stream) -> str:
    """32 hexadecimal digits of all images of a data set in their order, the main process's.

    Those in memory count with all their bytes. Images on disk count with the digest of their source
    and, since what is made of them counts too, with 64 of them decoded.
    """

    def words() -> str:
        if isinstance(data, datasets.Stream):
            index = np.unique(np.linspace(0, len(data) - 1, digests.SAMPLES).astype(int))
            some = data[torch.from_numpy(index)].numpy()
            return digests.joined(digests.of_source(data.source), digests.of_array(some))
        images = data.images if isinstance(data, datasets.Labelled) else data
        return digests.of_array(images.cpu().contiguous().numpy(), whole=True)

    return distributed.from_main(words)[:32]


def _read_statistics(path: Path, space: FeatureSpace) -> Reference:
    """From `mu` and `sigma`, or `pool_3`, features; ValueError where they do not fit."""
    found = read_arrays(path)
    features = found.get("pool_3")
    if not {"mu", "sigma"} <= found.keys() and features is None:
        raise ValueError(f"{path} holds no statistics: neither mu and sigma nor pool_3")
    width = np.atleast_1d(found.get("mu", features)).shape[-1]
    if width != space.width:
        raise ValueError(
            f"{path} holds statistics of {width} features, but eval.features={space.name!r} has "
            f"{space.width}: name another folder in eval.stats_dir, or the network they are of"
        )
    spec = {"mu": ("f", (width,)), "sigma": ("f", (width, width)), "count": ("iu", ())}
    spec |= {"pool_3": ("f", (None, width))}
    check_arrays(path, found, {name: kind for name, kind in spec.items() if name in found})
    if features is not None and len(features) < 2:
        raise ValueError(f"{path}: pool_3 are features of {len(features)} images, too few")
    if {"mu", "sigma"} <= found.keys():
        gaussian = Gaussian(np.float64(found["mu"]), np.float64(found["sigma"]))
    else:
        gaussian = Gaussian.fit(features)
    complete = features is not None and len(features) == found.get("count", len(features))
    return Reference(gaussian, features, found.get("index"), complete)
