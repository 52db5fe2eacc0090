"""The data of a run, as a config names them: opened once for each split, measured, identified."""

import contextlib
import functools
import logging
from dataclasses import replace

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

import distributed
import sources
from sources import description, digests, hugging_face, moments, splits
from sources.base import Classes, Source
from sources.batch import KINDS, Conditions
from sources.codec import Codec
from sources.encoded import cached_latents
from sources.identity import Identity, fingerprint
from sources.images import Shape
from sources.keyed import keyed_generator, keyed_seed
from sources.labels import number_of
from sources.latents import Latents
from sources.measures import mean_norm
from sources.moments import Moments
from sources.opened import MEASURED, SPLITS, OpenedData
from sources.pairs import EncodedConditions, codec_of
from sources.patches import Patches
from sources.sizes import made_of
from sources.stream import (
    MAX_WORKERS,
    DataSet,
    Resident,
    Stream,
    batch_at,
    in_order,
    processors,
    resident,
    shuffled_batches,
)
from storage.files import plain

__all__ = [
    "MEASURED",
    "SPLITS",
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
    "sources",
]

log = logging.getLogger(__name__)

# `from datasets import load_dataset` is told what to write instead
__getattr__ = hugging_face.refuse


class DataChanged(ValueError):
    """The data are not those of the run; nothing goes on without them."""


class Data(OpenedData):
    """The data that `options`, a config's `data`, name, and the identity of a run's data.

    One object serves all of a start, which lists a folder once; values that `options` leave open
    are measured, and may be filled in later. A run continues on the data it began with, whose
    identity is `stored`. Other data are refused or, with `data.changed='allow'`, accepted and
    logged by `close`; classes keep the numbers that the run gave their names. Of several processes
    the main one compares.

    All that reads raises ValueError where data are refused or malformed, and OSError where they are
    missing; see `get_dataset`.
    """

    def __init__(self, options: ConfigDict, stored: Identity | None = None):
        super().__init__(options)
        self.stored = stored
        self._rows: dict[str, dict[str, Tensor]] = {}  # the named conditions of a split
        self._latents: Source | None = None  # of the training split
        self._is_compared = self._is_closed = False
        self._warnings: list[str] = []  # for `close`: by then a run has opened its log

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

    def get(self, split: str, labels: bool = True, whole: bool = False) -> DataSet:
        """The images of `split` as stored, with conditions as of `get_dataset`.

        With `data.patch` they are patches, one of each (`sources.patches`), unless `whole`. Without
        `labels` the conditions of `data.condition_path` are left out too.
        """
        self._compare()
        data, source = self.options, self._source(split)
        beside = {"image": self._encoded_conditions(split)} if self.has_pairs and labels else {}
        workers = data.num_workers if data.num_workers >= 0 else min(MAX_WORKERS, processors())
        conditions = self.conditions(split, labels)
        names = self._numbered(split).names if "class_labels" in conditions else ()
        shape = self.whole_shape if whole else self.shape
        if shape != self.whole_shape:
            source = Patches(source, shape[1:])
            beside = {name: Patches(rows, shape[1:]) for name, rows in beside.items()}
        stream = Stream(source, shape, workers, conditions, names, beside)
        images = resident(stream, data.resident_bytes)
        del self._sources[split]  # see `close`
        return images

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

    def paired(self, split: str, rows: Tensor) -> Tensor:
        """Conditions (k, C, H, W) of the images number `rows` (k,), encoded."""
        conditions, channels = self._encoded_conditions(split), self.options.condition_channels
        if self.shape != self.whole_shape:
            conditions = Patches(conditions, self.shape[1:])
        stream = Stream(conditions, (channels, *self.shape[1:]))
        return stream[rows]

    def _encoded_conditions(self, split: str) -> EncodedConditions:
        codec = codec_of(self.options, self.whole_shape[1:])
        return EncodedConditions(self._conditions_of(split), codec)

    def encoded(
        self, images: DataSet, codec: Codec, device: torch.device | str
    ) -> tuple[DataSet, Codec]:
        """The training `images` and their codec or, with an autoencoder in a file, their latents.

        The latents have the conditions of the images, and a codec of their own. With
        `data.random_flip` each latent is followed by that of the mirror image.
        """
        if not isinstance(codec, Latents):
            return images, codec
        repeats, source = 1 + self.options.random_flip, self.latents(images, codec, device)
        conditions = getattr(images, "conditions", Conditions())
        conditions = conditions.map(lambda rows: rows.cpu().repeat_interleave(repeats, 0))
        workers, names = getattr(images, "workers", 0), getattr(images, "names", ())
        stream = Stream(source, codec.shape, workers, conditions, names)
        return resident(stream, self.options.resident_bytes), codec.scale

    def latents(self, images: DataSet, codec: Latents, device: torch.device | str) -> Source:
        """Latents (h, w, c) of the training `images` before they are scaled; see `encoded_once`."""
        if self._latents is None:
            digest, mirrored = fingerprint(images), self.options.random_flip
            self._latents = cached_latents(images, digest, codec, mirrored, device)
        return self._latents

    def measure_latents(self, codec: Latents, device: torch.device | str) -> Moments:
        """Moments of the training images' latents, before they are scaled."""
        latents = self.latents(self.get("train", labels=False), codec, device)
        return moments.measure(latents)

    def number(self, split: str) -> int:
        """The number of images of `split`."""
        return len(self._source(split))

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
        self._folder = self._pairs = self._latents = None
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
        conditions = [self._conditions_of(split) for split in SPLITS] if self.has_pairs else []
        parts = [*map(digests.of_source, sources + conditions)]
        parts += [self.prior_digest] if self.options.prior_dataset else []
        digest = digests.joined(*parts, *names)
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
        if self.has_pairs:
            channels = data.condition_channels
            number = f"{channels} channel{'s' * (channels != 1)}"
            remarks.append(f"conditions of {number}: {data.condition_path}")
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
