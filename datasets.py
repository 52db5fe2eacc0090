"""The data of a run, as a config names them: opened once for each split, measured, identified."""

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

import distributed
import sources
from configs import keys
from sources import description, digests, folder, hugging_face, moments, splits
from sources.arrays import Arrays, is_array
from sources.base import Classes, Source
from sources.batch import KINDS, Conditions
from sources.files import Measured
from sources.folder import Folder
from sources.identity import Identity
from sources.images import ImageSize, Shape, image_size_of, sides_of
from sources.keyed import keyed_generator, keyed_seed
from sources.labels import number_of
from sources.loaded import Loaded
from sources.moments import Moments
from sources.patches import Patches
from sources.sizes import extent, made_of, shapes_of
from sources.stream import (
    MAX_WORKERS,
    SMALL,
    DataSet,
    Resident,
    Stream,
    batch_at,
    decode,
    in_order,
    processors,
    shuffled_batches,
)
from storage.files import plain

__all__ = [
    "Data",
    "DataChanged",
    "DataSet",
    "Resident",
    "Stream",
    "batch_at",
    "get_dataset",
    "in_order",
    "keyed_generator",
    "keyed_seed",
    "mean_norm",
    "shuffled_batches",
]

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
MEASURED = 64  # images of which channels and sizes are measured

# `from datasets import load_dataset` is told what to write instead
__getattr__ = hugging_face.refuse


class DataChanged(ValueError):
    """The data are not those of the run; nothing goes on without them."""


class Data:
    """The data that `options`, a config's `data`, name; each split is opened when it is needed.

    One object serves all of a start, which lists a folder once; values that `options` leave open
    are measured, and may be filled in later. A run continues on the data it began with, whose
    identity is `stored`. Other data are refused or, with `data.changed='allow'`, accepted and
    logged by `close`; classes keep the numbers that the run gave their names. Of several processes
    the main one compares.

    All that reads raises ValueError where data are refused or malformed, and OSError where they are
    missing; see `get_dataset`.
    """

    def __init__(self, options: ConfigDict, stored: Identity | None = None):
        self.options, self.stored = options, stored
        self._folder: Folder | Arrays | Loaded | None = None
        self._sources: dict[str, Source] = {}
        self._classes: dict[str, Classes] = {}
        self._rows: dict[str, dict[str, Tensor]] = {}  # the named conditions of a split
        self._is_compared = self._is_closed = False
        self._warnings: list[str] = []  # for `close`: by then a run has opened its log

    @property
    def name(self) -> str:
        """Name of the data set, with the category where it has several."""
        category = self.options.get("category")
        return self.options.dataset.lower() + (f"_{category}" if category else "")

    @property
    def whole_shape(self) -> Shape:
        """(C, H, W) of an image."""
        channels = self.options.num_channels or self.measure_channels()
        return channels, *sides_of(self.options.image_size or self.measure_size())

    @property
    def shape(self) -> Shape:
        """(C, H, W) of what the network sees of an image: of its patch, or `whole_shape`."""
        (channels, *sides), patch = self.whole_shape, tuple(self.options.patch)
        if patch and (patch[0] > sides[0] or patch[1] > sides[1]):
            raise ValueError(f"data.patch={patch} is larger than the data, {sides[0]} x {sides[1]}")
        if patch and "image" in self.condition_names:
            raise ValueError("data.patch cuts images, but not those of data.conditions='image'")
        return channels, *(patch or sides)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the run's classes in the order of their numbers, where it has any."""
        return self.stored.classes if self.stored else ()

    def class_number(self, name: str) -> int:
        """The number of the class called `name`, of the run or, before it has any, of the data."""
        names = self.class_names
        if not names and self.options.num_classes:
            names = self._read_classes("train").names
        return number_of(name, names)

    @property
    def condition_names(self) -> list[str]:
        """Names of the conditions besides class labels, from `data.conditions`."""
        return [name.strip() for name in self.options.conditions.split(",") if name.strip()]

    @property
    def takes_scale(self) -> bool:
        """True where `data.scale` makes 8 bits of 16: image files that are no numbers of a type."""
        path = self.options.path if self._is_folder and not self.options.dtype else ""
        return bool(path) and not is_array(Path(path))

    @property
    def are_arrays(self) -> bool:
        """True where the data are an .npy or .npz, whose numbers may be in units of their own."""
        return self._is_folder and is_array(Path(self.options.path))

    def get(self, split: str, labels: bool = True, whole: bool = False) -> DataSet:
        """The images of `split` as stored, with conditions as of `get_dataset`.

        With `data.patch` they are patches, one of each (`sources.patches`), unless `whole`.
        """
        self._compare()
        data, source = self.options, self._source(split)
        workers = data.num_workers if data.num_workers >= 0 else min(MAX_WORKERS, processors())
        conditions = self.conditions(split, labels)
        names = self._numbered(split).names if "class_labels" in conditions else ()
        shape = self.whole_shape if whole else self.shape
        if shape != self.whole_shape:
            source = Patches(source, shape[1:])
        stream = Stream(source, shape, workers, conditions, names)
        first, *_ = stream.read([0])  # so that data of which none can be used are refused here
        size = len(stream) * first.nbytes
        del self._sources[split]  # see `close`
        if size > data.resident_bytes:
            return stream
        if size <= SMALL:
            stream.workers = 0
        return decode(stream)

    def conditions(self, split: str, labels: bool = True) -> Conditions:
        """Conditions of each image of `split`; no image is decoded.

        They are those that `data.conditions` names, from a source with a method `conditions()`,
        and class labels unless `data.num_classes` is 0.
        """
        self._compare()
        if unknown := [name for name in self.condition_names if name not in KINDS]:
            raise ValueError(
                f"data.conditions={self.options.conditions!r}: {unknown[0]} is no kind of "
                f"condition; known: {', '.join(KINDS)} (sources.batch.KINDS takes more)"
            )
        rows = self._rows.setdefault(split, {})
        names = [name for name in self.condition_names if name not in rows]
        source = self._source(split) if names else ()
        arrays = source.conditions() if hasattr(source, "conditions") else {}
        for name in names:
            if name not in arrays or len(arrays[name]) != len(source):
                raise ValueError(
                    f"data.conditions={self.options.conditions!r}: {self.options.dataset} gives no "
                    f"{name} of its {len(source)} images ({split} split)"
                )
            rows[name] = torch.from_numpy(plain(np.asarray(arrays[name])))
        if labels and self.options.num_classes:
            labelled = {"class_labels": torch.from_numpy(self._numbered(split).labels)}
            return Conditions(rows | labelled)
        return Conditions(rows)

    def labels(self, split: str) -> Tensor:
        """Class labels (n,), int64, of a split; no image is decoded."""
        self._compare()
        labels = torch.from_numpy(self._numbered(split).labels)
        return labels[labels >= 0]

    def has_labels(self, split: str) -> bool:
        """Whether any image of a split has a class label; a test split may do without."""
        return bool(self.options.num_classes and (self._numbered(split).labels >= 0).any())

    def remark(self, split: str) -> str:
        """Text on what is amiss with a loss or likelihood over `split`; "" where nothing is."""
        remarks = []
        if split == "test" and self.split_words == splits.NONE_HELD_OUT:
            remarks.append("of the training images, as none are held out (data.held_out=0)")
        if self.options.num_classes and not self.has_labels(split):
            remarks.append(f"without class labels, which the {split} split does not have")
        return "; ".join(remarks)

    def close(self) -> None:
        """Release what was opened, and log once how the data differ from those of the run.

        Data that are first compared after it have this logged at once.
        """
        self._folder = None
        self._sources.clear()  # they may hold as much memory as the images
        self._is_closed = True
        self._warn()

    # --- identity ---------------------------------------------------------------------------------

    @functools.cached_property
    def identity(self) -> Identity:
        """The identity of both splits as they are now, with their own class numbers.

        Each file of a folder is read once, unless `data.digest` is 'names' (`digests.of_files`).
        """
        names, kind = (), self.options.digest
        sources = [self._source(split) for split in SPLITS]
        if self.options.num_classes:
            with contextlib.suppress(ValueError):  # there are no labels: `get` says so
                names = self._read_classes("train").names
        digest = digests.joined(*map(digests.of_source, sources), *names)
        return Identity(*map(len, sources), names, f"{kind}:{digest}")

    def identity_of_run(self) -> Identity:
        """Identity that the run stores: that of these data, with the class numbers of the run."""
        return replace(self.identity, classes=self.class_names or self.identity.classes)

    def _compare(self) -> None:
        if self.stored is None or self._is_compared or not distributed.is_main():
            return
        changes = self.stored.changes(self.identity)
        if changes and self.options.changed != "allow":
            new = self.stored.new_classes(self.identity.classes)  # which have no number
            allow = "" if new else ", or go on with these: --config.data.changed=allow"
            raise DataChanged(
                f"the data are not those of the run ({changes}): restore them, or start a new "
                f"workdir{allow}"
            )
        if changes:
            self._warnings.append(
                f"the data are not those of the run ({changes}): data.changed='allow'"
            )
        if not self.stored.comparable(self.identity):
            self._warnings.append(
                "the contents of the data are not compared with those of the run, whose digest is "
                f"{self.stored.digest.partition(':')[0]!r} (data.digest)"
            )
        self._is_compared = True
        if self._is_closed:
            self._warn()

    def _warn(self) -> None:
        while self._warnings:
            log.warning(self._warnings.pop(0))

    # --- sources and classes ----------------------------------------------------------------------

    @property
    def _is_folder(self) -> bool:
        return sources.SOURCES.get(self.options.dataset.lower()) is folder.open_folder

    @property
    def split_words(self) -> str:
        """Text on how the data are split; "" for a named data set that is split as by default."""
        data = self.options
        if self._is_folder:
            if names := self._find().split_names:
                return "{train} and {test}".format(**names)
            return splits.in_words(data.held_out, self._find().by_name, data.groups)
        source = sources.SOURCES.get(data.dataset.lower())
        if data.held_out == splits.SHARE or "data.held_out" not in keys.of_part(source, "reads"):
            return ""
        return splits.in_words(data.held_out, by_name=False)

    def _find(self) -> Folder | Arrays | Loaded:
        """The images at `data.path`, listed at the first call."""
        if self._folder is None:
            self._folder = folder.find(self.options)
        return self._folder

    def _open(self, split: str, channels: int, size: ImageSize) -> Source:
        """The images of `split` with `channels` and `size`; 0: those that are stored."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        name = self.options.dataset
        open_split = keys.named(sources.SOURCES, "data.dataset", name)
        if self._is_folder:
            open_split = self._find().open
        options = self.options.copy_and_resolve_references()
        with options.ignore_type():  # a size may be one number or two
            options.num_channels, options.image_size = channels, size
        source = open_split(options, split)
        if not len(source):
            raise ValueError(f"{name} holds no images for the split {split}")
        return source

    def _source(self, split: str) -> Source:
        if split not in self._sources:
            channels, *sides = self.whole_shape
            self._sources[split] = self._open(split, channels, image_size_of(sides))
        return self._sources[split]

    def _read_classes(self, split: str) -> Classes:
        if split not in self._classes:
            source = self._source(split)
            message = (
                f"data.num_classes asks for class labels, which {self.options.dataset} does not "
                f"give ({split} split)"
            )
            if not hasattr(source, "classes"):
                raise ValueError(message)
            try:
                self._classes[split] = source.classes()
            except ValueError as error:
                raise ValueError(f"{message}: {error}") from error
        return self._classes[split]

    def _numbered(self, split: str) -> Classes:
        """The classes of `split` with the run's numbers, which are in range."""
        data, classes = self.options, self._read_classes(split)
        if self.stored:
            classes = self.stored.renumbered(classes)
        largest = int(classes.labels.max())
        if 0 <= data.num_classes <= largest:
            raise ValueError(
                f"a class label of {data.dataset}, {split} split, is {largest}, but with "
                f"data.num_classes={data.num_classes} they are numbered from 0 to "
                f"{data.num_classes - 1}"
            )
        return classes

    # --- measured values --------------------------------------------------------------------------

    def measure_channels(self) -> int:
        """Channels of the training images: 1 where up to `MEASURED` of them are grey, else 3.

        Grey images have R = G = B in every pixel. Arrays keep the channels they are stored with.
        """
        return max(channels for *_, channels in self._measured_shapes)

    def measure_size(self) -> ImageSize:
        """The size of up to `MEASURED` training images; ValueError where these differ."""
        sizes = {(height, width) for height, width, _ in self._measured_shapes}
        if len(sizes) > 1:
            raise ValueError(
                f"data.image_size=0 takes images as they are, but these have {extent([*sizes])} "
                "pixels: set it to one size, to which they are cut and resized"
            )
        return image_size_of(*sizes)

    @functools.cached_property
    def _measured_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes (H, W, C) of up to `MEASURED` training images, spread over the split."""
        return shapes_of(self._open("train", 0, self.options.image_size), MEASURED)

    def measure_scale(self) -> Measured:
        """The `data.scale` of 16-bit images of either split; () where there are no such files."""
        if not (self.takes_scale and folder.exists(self.options.path)):
            return Measured(())
        options = {"delay": 1, "disable": not distributed.is_main()}
        watch = partial(tqdm, desc="range of 16-bit images", unit="image", **options)
        return self._find().measure_scale(watch)

    def measure_dtype(self) -> str:
        """The `data.dtype` of an .npy or .npz; "" of 8-bit images, and where there is no file."""
        path = Path(keys.with_home("data.path", self.options.path))
        return self._find().dtype() if self.are_arrays and path.exists() else ""

    def measure_moments(self) -> Moments:
        """The moments of the training images, by `data.scale`."""
        options = {"delay": 1, "disable": not distributed.is_main()}
        watch = partial(tqdm, desc="mean and deviation", unit="image", **options)
        return moments.measure(self._source("train"), self.options.scale, watch)

    def measure_classes(self) -> int:
        """Number of classes of the training images: with names, or as many as labels need."""
        classes = self._read_classes("train")
        return max(len(classes.names), int(classes.labels.max()) + 1)

    # --- the log ----------------------------------------------------------------------------------

    def describe(self, train: DataSet, test: DataSet, changed: str = "") -> str:
        """One line for the log: where the data of a run are, and how images are made from them.

        `changed` says how a training step changes the images.
        """
        data, name, remarks = self.options, self.options.dataset.lower(), []
        shape = tuple(train[:1].shape[1:])
        if data.num_classes and not self.has_labels("test"):
            remarks.append("the test split has no class labels")
        if self._is_folder:
            name, omitted = str(data.path), self._find().omitted
            remarks.append(made_of(self._source("train"), shape[1:]))
            remarks.append(omitted and f"left out: {omitted}")
        return description.line(
            name,
            (len(train), len(test)),
            shape,
            patch=tuple(data.patch),
            split=self.split_words,
            changed=changed,
            classes=data.num_classes,
            class_names=getattr(train, "names", ()),
            remarks=remarks,
        )


def get_dataset(config, split: str, labels: bool = True) -> DataSet:
    """The data of a split, "train" or "test", that `config.data` names; see the module.

    It has conditions, and among them, unless `labels` is False, class labels where
    `data.num_classes` is not 0. Data that take at most `data.resident_bytes` when decoded are
    decoded at once, without the images that cannot be read; larger data stay on disk. A
    `data.num_channels` or `data.image_size` of 0 and a `data.scale` of () are measured.

    Raises ValueError for an unknown data set or split, no image that can be read, images of another
    shape than configured, or class labels that are missing or out of range; OSError where the data
    are not where they should be.
    """
    return Data(config.data).get(split, labels)


def mean_norm(data: DataSet, encode: Callable[[Tensor], Tensor]) -> float:
    """Mean Euclidean norm of a data set's images, which `encode` takes as stored."""
    total, at_once = 0.0, max(1, SMALL // data[:1].numel())
    for batch in in_order(data, at_once):
        total += encode(batch.images).flatten(1).norm(dim=1).sum().item()
    return total / len(data)
