"""Statistics of the data with which samples are compared: measured once, and cached."""

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import distributed
from configs.schema import Key, Text
from datasets import Data, DataChanged, DataSet, in_order
from metrics.distances import Gaussian, TooFew, shortage
from metrics.features import EXTRACTED_AT_ONCE, FeatureSpace, get_spaces
from metrics.published import with_our_names
from sources.codec import Codec
from sources.identity import digest_of, fingerprint
from storage.digests import digests as digests_of_tensors
from storage.files import check_arrays, read_arrays, save_npz, sparing_time

log = logging.getLogger(__name__)

KEYS = {
    "eval.stats_dir": Key(
        "assets/stats",
        Text(r"[^\0\n]+", "the name of a folder"),
        "reference statistics: published ones, and those made here",
        of_machine="always",
    ),
}

FEATURES_KEPT = 50_000  # of the data's images, for what needs more than their moments


@dataclass(frozen=True)
class Reference:
    """The features of the data that samples are compared with.

    `gaussian` has the moments over all images; None for a single image. `features` (m, K) are kept
    of a bounded number of images, in random order, and `index` (m,) has the numbers of these;
    published statistics may lack either. `complete`: `features` are those of all images.
    """

    gaussian: Gaussian | None
    features: NDArray | None = None
    index: NDArray | None = None
    complete: bool = False

    @classmethod
    def measure(cls, blocks: Iterable[NDArray], count: int, keep: int) -> "Reference":
        """The reference of `count` images whose features come in blocks (n_i, K).

        Of the features those of `keep` images are kept.
        """
        index = np.random.default_rng(0).permutation(count)[:keep]
        is_kept = np.isin(np.arange(count), index)
        parts: list[NDArray] = []

        def keeping() -> Iterator[NDArray]:
            start = 0
            for block in blocks:
                parts.append(block[is_kept[start : start + len(block)]])
                start += len(block)
                yield block

        try:
            gaussian = Gaussian.fit_blocks(keeping())
        except TooFew:
            gaussian = None
        features = np.concatenate(parts)[np.argsort(np.argsort(index))]  # from the data's order
        return cls(gaussian, features, index, complete=len(index) == count)


@dataclass
class ReferenceStatistics:
    """Reference statistics of the data in one feature space, and the file that caches them.

    `data` is the training split, and `path` the file of its statistics; both are None where
    published statistics take its place. `reference` is None until the data are measured. `identity`
    is stored in the file at `path`: the data's fingerprint, the space, the images' shape. `origin`
    says which data they are: `data`, `split`, number of `images` and `digest`; for published
    statistics the name of their file and its digest.
    """

    space: FeatureSpace
    reference: Reference | None
    data: DataSet | None = None
    path: Path | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str | int] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls, config, device: torch.device, data: Data, codec: Codec
    ) -> "list[ReferenceStatistics]":
        """Reference statistics in each feature space of `config`; raises as `build`."""
        spaces = get_spaces(config.eval.features, config.eval.inception_path, codec, device)
        for space in spaces:
            number = config.eval.num_samples
            if words := shortage(number, space.width):
                log.warning(f"eval.num_samples={number} is {words} ({space.label})")
        folder, train = Path(config.eval.stats_dir), Training(data)
        return [cls.build(space, folder, train, further=i > 0) for i, space in enumerate(spaces)]

    @classmethod
    def build(
        cls, space: FeatureSpace, folder: Path, train: "Training", further: bool = False
    ) -> "ReferenceStatistics":
        """The statistics of the training split, cached in `folder`.

        The published file of a `further` space, one after the first of eval.features, names it.

        Raises ValueError, in one line, for what cannot be loaded or does not fit.
        """
        channels, height, width = train.source.shape
        name, size = train.source.name, height if height == width else f"{height}x{width}"
        identity = {"space": space.name, "shape": f"{height}x{width}x{channels}"}
        suffix = f"_{space.label}_stats.npz" if further else "_stats.npz"
        names = f"{name}_{size}{suffix}", f"{name}{suffix}"
        for published in (folder / each for each in names):
            if published.exists():
                return cls._published(space, published, identity, train)
        identity["data"], data = train.fingerprint, train.data
        path = folder / f"{name}_train_{identity['shape']}_{space.name}_{identity['data']}.npz"
        cached = path.exists()
        log.info(
            f"statistics of the data: {path}, {'kept' if cached else 'to be measured'}, as there "
            f"is no {' or '.join(names)}"
        )
        reference = (
            read_reference(path, read_arrays(path), space, identity, REMEDY) if cached else None
        )
        origin = {"data": name, "split": "train", "images": len(data), "digest": identity["data"]}
        return cls(space, reference, data, path, identity, origin)

    @classmethod
    def _published(
        cls, space: FeatureSpace, path: Path, identity: dict[str, str], train: "Training"
    ) -> "ReferenceStatistics":
        """The statistics in the file at `path`, whose data are compared with those in `train`."""
        arrays = read_arrays(path)
        if "data" in arrays:
            try:
                identity["data"] = train.fingerprint
            except DataChanged:
                raise
            except ValueError as error:
                log.info(f"{path} cannot be compared with the training images: {error}")
        statistics = {name: array for name, array in arrays.items() if name != "index"}
        reference = read_reference(path, statistics, space, identity, REMEDY)
        compared = identity.keys() & arrays.keys()
        missing = [word for name, word in IDENTITY.items() if name not in compared]
        doubt = f", nor its {', '.join(missing)}" if missing else ""
        log.info(f"statistics of the data: {path}, which names no training images{doubt}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        origin = {"data": path.name, "split": "published", "digest": digest}
        return cls(space, reference, origin=origin)

    @property
    def labels(self) -> NDArray | None:
        """The class labels (m,) of the features of the reference, where they are known."""
        all_labels = getattr(self.data, "labels", None)
        return None if all_labels is None else all_labels.cpu().numpy()[self.reference.index]

    def measure(self, progress: Callable[[int], object]) -> None:
        """Compute and cache the statistics of the data; `progress` is called with image counts."""

        def blocks() -> Iterator[NDArray]:
            for batch in in_order(self.data, EXTRACTED_AT_ONCE):
                yield self.space(batch.images.permute(0, 2, 3, 1).cpu().numpy())[0]
                progress(len(batch))

        count = len(self.data)
        self.reference = measured = Reference.measure(blocks(), count, FEATURES_KEPT)
        arrays = {"pool_3": measured.features, "index": measured.index, "count": count}
        if gaussian := measured.gaussian:
            arrays |= {"mu": gaussian.mean, "sigma": gaussian.covariance}
        # evaluations of two workdirs may measure the same data at the same time
        beside = self.path.with_suffix(f".{os.getpid()}.npz")
        with sparing_time("the statistics of the data are"):
            save_npz(beside, **arrays, **self.identity)
            beside.replace(self.path)
            log.info(f"statistics of the data: {self.path}")


def origin_of(data: DataSet) -> dict[str, str]:
    """Digests of a data set and of its conditions, on which results depend."""
    conditions = {} if isinstance(data, Tensor) else data.conditions
    return {"data": fingerprint(data)} | digests_of_tensors(**conditions)


@dataclass(frozen=True)
class Training:
    """The training split of `source`, decoded and digested once for all feature spaces."""

    source: Data

    @functools.cached_property
    def data(self) -> DataSet:
        try:
            return self.source.get("train")
        except DataChanged:
            raise
        except ValueError:  # a network with class labels can be sampled without those of the data
            return self.source.get("train", labels=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of `data`, which the main process opens and tells to the others: all go one way.

        Raises, in all processes, DataChanged, and ValueError where the data cannot be read.
        """

        def words() -> str:
            try:
                return f"digest {digest_of(self.data)}"
            except DataChanged as error:
                return f"changed {error}"
            except (OSError, ValueError) as error:
                return f"unread {error}"

        kind, _, text = distributed.from_main(words).partition(" ")
        if kind != "digest":
            raise (DataChanged if kind == "changed" else ValueError)(text)
        return text


REMEDY = "; remove it, or name another folder in eval.stats_dir"

# The entries of a file that say what its statistics are of, and how messages call them.
IDENTITY = {"space": "feature space", "shape": "image size", "data": "digest"}


def read_reference(
    path: Path,
    arrays: Mapping[str, NDArray],
    space: FeatureSpace | None,
    identity: Mapping[str, str],
    remedy: str = "",
) -> Reference:
    """Reference from the `arrays` of a statistics file: moments, or features, or both.

    Raises ValueError where they do not fit the `space`, are no statistics, or say that they are of
    another `identity`; `remedy` ends the message.
    """
    arrays = with_our_names(arrays)
    features, moments = arrays.get("pool_3"), {"mu", "sigma"} <= arrays.keys()
    if not moments and features is None:
        raise ValueError(f"{path} holds no statistics: neither mu and sigma nor pool_3")
    width = np.atleast_1d(arrays.get("mu", features)).shape[-1]
    if space and width != space.width:
        raise ValueError(
            f"{path} holds statistics of {width} features, but the space {space.name!r} has "
            f"{space.width}: they are of another network{remedy}"
        )
    spec = {"mu": ("f", (width,)), "sigma": ("f", (width, width)), "pool_3": ("f", (None, width))}
    spec |= {"count": ("iu", ()), "index": ("iu", (len(np.atleast_1d(features)),))}
    spec |= dict.fromkeys(identity, ("U", ()))
    check_arrays(path, arrays, {name: kind for name, kind in spec.items() if name in arrays})
    for name, expected in identity.items():
        if (value := str(arrays.get(name, expected))) != expected:
            raise ValueError(
                f"{path} holds statistics of other data: their {IDENTITY[name]} is {value:.80}, "
                f"not {expected}{remedy}"
            )
    number = 0 if features is None else len(features)
    count, gaussian = int(arrays.get("count", max(number, 2))), None
    if features is not None and number < min(2, count):
        raise ValueError(f"{path}: pool_3 are features of {number} images, too few")
    if count < max(number, 1):
        raise ValueError(f"{path}: pool_3 are features of {number} images, but count is {count}")
    if moments:
        gaussian = Gaussian(np.float64(arrays["mu"]), np.float64(arrays["sigma"]))
        try:
            gaussian.check()
        except ValueError as error:
            raise ValueError(f"{path}: sigma is {error}") from error
    elif number > 1:
        gaussian = Gaussian.fit(features)
    complete = features is not None and number == count
    index = arrays.get("index")
    if index is not None:
        if not 0 <= index.min() <= index.max() < count:
            raise ValueError(f"{path}: index has numbers that none of {count} images has")
        index = index.astype(np.int64)  # PyTorch takes indices of 8 bits for a mask
    return Reference(gaussian, features, index, complete)
