"""Data sets with random access, and a deterministic stream of batches from them.

A data set is a tensor, with class labels `Labelled`, or a `Stream` from disk: all have `len()`, and
indexing by an integer tensor or a slice gives uint8 images (k, C, H, W). Batches have the labels
too, where `data.num_classes` asks for them. Order and noise depend on (seed, step) alone, so
the batches can start anywhere and do not depend on which process decodes them.
"""

import collections
import contextlib
import functools
import itertools
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
import sources
from configs import keys
from sources import augmentation, digests, folder
from sources.base import Classes, Source, Unreadable
from sources.batch import Batch
from sources.identity import Identity
from sources.sixteen_bits import Measured
from sources.sizes import made_of
from storage.files import one_line

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
MAX_TRIES = 1000  # images in a row that may be unreadable
MAX_NAMED = 20  # unreadable images, or classes, that are named
MAX_WORKERS = 8  # of data.num_workers=-1
SMALL = 2**24  # bytes of images that are decoded before processes to do it have started
NO_LABELS = "data.num_classes asks for class labels, which {} does not give ({} split)"
MEASURED = 64  # images that `measure_channels` looks at


def keyed_seed(purpose: str, *key: int) -> int:
    """A 64-bit seed for `purpose` and the integers `key` (each >= 0), its own for each of them."""
    words = (zlib.crc32(purpose.encode()), len(key), *key)  # the length: (1,) is not (1, 0)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def keyed_generator(device: torch.device | str, purpose: str, *key: int) -> torch.Generator:
    """A generator on `device` that starts from `keyed_seed`."""
    return torch.Generator(device).manual_seed(keyed_seed(purpose, *key))


@dataclass(frozen=True)
class Labelled:
    """Images in memory (n, C, H, W) with their class `labels` (n,), int64, and the classes' names.

    Indexing gives the images alone.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.images[index]

    def to(self, device: torch.device | str) -> "Labelled":
        return Labelled(self.images.to(device), self.labels.to(device), self.names)


class Stream:
    """Images that stay on disk and are decoded when they are indexed.

    An image that cannot be read, or has another shape, is replaced by the next one that can be
    used, and is named in a warning; so length and order do not depend on when a damage is found.
    `shape` is (C, H, W). `labels` (n,) and `names` are those of the classes, if there are any. So
    many `workers` decode the batches of `in_order` and `shuffled_batches`; with 0 the process does
    that asks for them.
    """

    def __init__(
        self,
        source: Source,
        shape: tuple[int, int, int],
        workers: int = 0,
        classes: Classes | None = None,
    ):
        self.source, self.shape, self.workers = source, shape, workers
        self.labels = None if classes is None else torch.from_numpy(classes.labels)
        self.names = () if classes is None else classes.names
        self.pinned = False
        self.unreadable: dict[int, str] = {}  # those met so far, and why

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.batch(index).images

    def batch(self, index: Tensor | slice) -> Batch:
        """The images of `index`, and their labels where there are any."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        return self._accept(self.read(index.tolist()))

    def to(self, device: torch.device | str) -> "Stream":
        """Batches will come in memory that is copied to `device` without waiting."""
        self.pinned = torch.device(device).type == "cuda"
        return self

    def read(self, index: list[int]) -> tuple[Tensor, list[int], dict[int, str]]:
        """Images (k, C, H, W), their numbers, and which of `index` were replaced, with the reason.

        The numbers are those of `index` but where an image was replaced by another.
        """
        unreadable: dict[int, str] = {}
        numbers, images = zip(*(self._readable(i, unreadable) for i in index), strict=True)
        return torch.from_numpy(np.stack(images)), list(numbers), unreadable

    def _readable(self, i: int, unreadable: dict[int, str]) -> tuple[int, np.ndarray]:
        tries = min(len(self), MAX_TRIES)
        for j in ((i + k) % len(self) for k in range(tries)):
            try:
                image = self.source[j].transpose(2, 0, 1)
            except Unreadable as error:
                unreadable[j] = str(error)
                continue
            if image.shape == self.shape:
                return j, image
            wanted = f"data.num_channels and data.image_size say {self.shape}"
            unreadable[j] = f"number {j} is {image.shape} (C, H, W), but {wanted}"
        raise ValueError(f"{tries} images in a row cannot be used; the last: {unreadable[j]}")

    def _accept(self, read: tuple[Tensor, list[int], dict[int, str]]) -> Batch:
        images, numbers, unreadable = read
        for i in unreadable.keys() - self.unreadable.keys():
            self.unreadable[i] = unreadable[i]
            if len(self.unreadable) <= MAX_NAMED:
                log.warning(f"unreadable image: {unreadable[i]}")
            if len(self.unreadable) == MAX_NAMED:
                log.warning("further unreadable images are not named")
        return Batch(images, None if self.labels is None else self.labels[numbers])

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """`self.batch(index)` for each index, decoded ahead by the worker processes."""
        if not self.workers:
            yield from (self.batch(index) for index in indices)
            return
        indices, asked = iter(indices), collections.deque()
        # a fork of this process would lack the threads that CUDA and ArrayRecord count on; workers
        # are forked from a server that has imported what they need and done no more
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])

        def ask() -> Iterator[list[int]]:
            for index in indices:
                asked.append(index)
                yield index.tolist()

        loader = DataLoader(
            _Reader(self),
            batch_size=None,
            sampler=ask(),
            num_workers=self.workers,
            pin_memory=self.pinned,
            generator=torch.Generator(),  # the global one belongs to dropout
            worker_init_fn=_follow_parent,
            multiprocessing_context=context,
        )
        batches = iter(loader)
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:  # as when a signal ends the group
                reason = one_line(error)
                log.warning(f"the processes that decode images died; going on without: {reason}")
                yield from (self.batch(index) for index in itertools.chain(asked, indices))
                return
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            asked.popleft()
            yield self._accept(batch)


class _Reader:
    """`Stream.read` for DataLoader; errors are handed over as they are, without a traceback."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __getitem__(self, index: list[int]):
        try:
            return self.stream.read(index)
        except Exception as error:
            return error


def _follow_parent(worker: int) -> None:
    """A worker outlives Ctrl-C, which reaches the whole group of processes, but not its parent.

    DataLoader watches the process that forked the worker, here the server, which would wait for
    its workers for ever after the training process is killed.
    """

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


class Data:
    """The data that `config.data` names, each split opened when it is first needed.

    Those of a run have to be the data that it began with, whose identity is `stored`: others are
    refused or, with `data.changed='allow'`, noted for `close`; a class has the number that the run
    gave its name. Of several processes the main one compares.

    Methods that read raise ValueError where data are refused or not as they should be, and OSError
    where they are not there; see `get_dataset`.
    """

    def __init__(self, config, stored: Identity | None = None):
        self.config, self.stored = config, stored
        self._sources: dict[str, Source] = {}
        self._classes: dict[str, Classes] = {}
        self._lines: list[str] | None = None  # None: not compared yet

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the run's classes in the order of their numbers, where it has any."""
        return self.stored.classes if self.stored else ()

    def get(self, split: str, labels: bool = True) -> Tensor | Labelled | Stream:
        """The images of `split`, with class labels as of `get_dataset`."""
        self._compare()
        data, source = self._options, self._source(split)
        workers = data.num_workers if data.num_workers >= 0 else min(MAX_WORKERS, _processors())
        shape = (data.num_channels, data.image_size, data.image_size)
        classes = self._numbered(split) if labels and data.num_classes else None
        stream = Stream(source, shape, workers, classes)
        stream.read([0])  # so that data of which none can be used are refused here
        size = len(stream) * math.prod(shape)
        del self._sources[split]  # see `close`
        if size > data.resident_bytes:
            return stream
        return _decoded(stream if size > SMALL else Stream(source, shape, 0, classes))

    def labels(self, split: str) -> Tensor:
        """The class labels (n,), int64, of a split, of which no image is decoded."""
        self._compare()
        labels = torch.from_numpy(self._numbered(split).labels)
        return labels[labels >= 0]

    @functools.cached_property
    def identity(self) -> Identity:
        """The identity of both splits as they are now, with their own class numbers.

        Each file of a folder is read once, unless `data.digest` is 'names' (`digests.of_files`).
        """
        names, kind = (), self.config.data.digest
        sources = [self._source(split) for split in SPLITS]
        if self.config.data.num_classes:
            with contextlib.suppress(ValueError):  # there are no labels: `get` says so
                names = self._read_classes("train").names
        digest = digests.joined(*map(digests.of_source, sources), *names)
        return Identity(*map(len, sources), names, f"{kind}:{digest}")

    def identity_of_run(self) -> Identity:
        """The identity for a run to keep: of these data, with the class numbers of the run."""
        return replace(self.identity, classes=self.class_names or self.identity.classes)

    def close(self) -> None:
        """Lets go of the opened sources, and logs, once, how the data differ from the run's."""
        self._sources.clear()  # they may hold as much memory as the images
        while self._lines:
            log.warning(self._lines.pop(0))

    def _compare(self) -> None:
        if self.stored is None or self._lines is not None or not distributed.is_main():
            return
        changes, lines = self.stored.changes(self.identity), []
        if changes and self.config.data.changed != "allow":
            new = self.stored.new_classes(self.identity.classes)  # which have no number
            allow = "" if new else ", or go on with these: --config.data.changed=allow"
            raise ValueError(
                f"the data are not those of the run ({changes}): restore them, or start a new "
                f"workdir{allow}"
            )
        if changes:
            lines.append(f"the data are not those of the run ({changes}): data.changed='allow'")
        if not self.stored.comparable(self.identity):
            lines.append(
                "the contents of the data are not compared with those of the run, whose digest is "
                f"{self.stored.digest.partition(':')[0]!r} (data.digest)"
            )
        self._lines = lines

    @functools.cached_property
    def _options(self):
        data = self.config.data
        if data.num_channels:
            return data
        return _with_channels(data, measure_channels(self.config))

    def _source(self, split: str) -> Source:
        if split not in self._sources:
            self._sources[split] = _source(self._options, split)
        return self._sources[split]

    def _read_classes(self, split: str) -> Classes:
        if split not in self._classes:
            self._classes[split] = _classes(self._source(split), self.config.data, split)
        return self._classes[split]

    def _numbered(self, split: str) -> Classes:
        """The classes of `split` with the run's numbers, which are in range."""
        data, classes = self.config.data, self._read_classes(split)
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


def get_dataset(config, split: str, labels: bool = True) -> Tensor | Labelled | Stream:
    """The data of a split, "train" or "test", that `config.data` names; see the module.

    It has class labels where `data.num_classes` is not 0, unless `labels` is False. What takes at
    most `data.resident_bytes` when decoded is decoded at once, without the images that cannot be
    read; what takes more stays on disk. A `data.num_channels` of 0 and a `data.scale` of () are
    measured.

    Raises ValueError for an unknown data set or split, no image that can be read, images of another
    shape than configured, or class labels that are missing or out of range; OSError where the data
    are not where they should be.
    """
    return Data(config).get(split, labels)


def measure_channels(config) -> int:
    """Channels of the training images: 1 where up to `MEASURED` of them are grey, else 3.

    They are spread over the split, and grey where R = G = B in every pixel. Arrays have as many as
    are stored. Raises ValueError and OSError as `get_dataset`.
    """
    source = _source(_with_channels(config.data, 0), "train")
    channels, last = [], None
    for i in np.linspace(0, len(source) - 1, min(len(source), MEASURED)).astype(int).tolist():
        try:
            channels.append(source[i].shape[2])
        except Unreadable as error:
            last = error
    if not channels:
        tried = min(len(source), MEASURED)
        raise ValueError(f"none of {tried} images can be used; the last: {last}")
    return max(channels)


def measure_scale(config) -> Measured:
    """The `data.scale` of 16-bit images, if any of train and test split are; see `sixteen_bits`.

    () where no image files are there. Raises ValueError and OSError as `get_dataset`.
    """
    options = {"delay": 1, "disable": not distributed.is_main()}
    watch = partial(tqdm, desc="range of 16-bit images", unit="image", **options)
    return folder.measure_scale(config.data, watch)


def takes_scale(config) -> bool:
    """Whether `data.scale` means anything: the data are image files."""
    return config.data.dataset.lower() == "folder" and folder.names_files(config.data.path)


def measure_classes(config) -> int:
    """How many classes the training images are of. Raises ValueError and OSError as `get_dataset`.

    They are the named ones, or as many as the largest label needs.
    """
    classes = _classes(_source(config.data, "train"), config.data, "train")
    return max(len(classes.names), int(classes.labels.max()) + 1)


def get_labels(config, split: str) -> Tensor:
    """The class labels (n,), int64, of a split, of which no image is decoded.

    Raises ValueError and OSError as `get_dataset`.
    """
    return Data(config).labels(split)


def _classes(source: Source, data, split: str) -> Classes:
    try:
        classes = source.classes() if hasattr(source, "classes") else None
    except ValueError as error:
        raise ValueError(f"{NO_LABELS.format(data.dataset, split)}: {error}") from error
    if classes is None:
        raise ValueError(f"{NO_LABELS.format(data.dataset, split)}")
    return classes


def describe(config, train: Tensor | Labelled | Stream, test: Tensor | Labelled | Stream) -> str:
    """A line for the log on the data of a run: where they are, and what is made of them."""
    data, held_out, left_out = config.data, "", ""
    channels, height, width = train[:1].shape[1:]
    changed = f"{'mirrored at random' if data.random_flip else 'not mirrored'} (data.random_flip)"
    if augment := config.training.augment:
        changed = f"transformed at random (training.augment={augment:g})"
    name, sizes = data.dataset.lower(), ""
    if name == "folder":
        name, (given, left_out) = str(data.path), folder.account(data)
        sizes = made_of(_source(data, "train"), data.image_size)
        held_out = " ({train} and {test})" if given else " (a random tenth is held out)"
        held_out = held_out.format(**given)
    return (
        f"data: {name}, {len(train):,} images to train on and {len(test):,} to test on{held_out}, "
        f"{height} x {width}, {channels} channel{'s' * (channels > 1)}, "
        f"{changed}"
        + (f", {data.num_classes} classes{_named(train.names)}" if data.num_classes else "")
        + (f"; {sizes}" if sizes else "")
        + (f"; left out: {left_out}" if left_out else "")
    )


def _named(names: tuple[str, ...]) -> str:
    if names == tuple(map(str, range(len(names)))):
        return ""
    shown = ", ".join(f"{k} {name:.30}" for k, name in enumerate(names[:MAX_NAMED]))
    return f" ({shown}{', ...' if len(names) > MAX_NAMED else ''})" if names else ""


def _source(data, split: str) -> Source:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    source = keys.named(sources.SOURCES, "data.dataset", data.dataset)(data, split)
    if not len(source):
        raise ValueError(f"{data.dataset} holds no images for the split {split}")
    return source


def _with_channels(data, channels: int):
    data = data.copy_and_resolve_references()
    data.num_channels = channels
    return data


def _decoded(stream: Stream) -> Tensor | Labelled:
    """All images of `stream` that can be read, (n, C, H, W), with their labels if there are any."""
    images = torch.empty(len(stream), *stream.shape, dtype=torch.uint8)
    interval = 0.2 if sys.stderr.isatty() else 10
    options = {"delay": 1, "mininterval": interval, "disable": not distributed.is_main()}
    with tqdm(total=len(stream), desc="decoding", **options) as progress:
        for piece, batch in zip(images.split(64), in_order(stream, 64), strict=True):
            piece.copy_(batch.images)
            progress.update(len(batch))
    labels = stream.labels
    if stream.unreadable:
        kept = torch.ones(len(stream), dtype=torch.bool)
        kept[list(stream.unreadable)] = False
        log.warning(f"{len(stream.unreadable)} of {len(stream)} images are unreadable and left out")
        images, labels = images[kept], None if labels is None else labels[kept]
    return images if labels is None else Labelled(images, labels, stream.names)


def _processors() -> int:
    """Those for this process, one of several that torchrun may have started on this machine."""
    known = hasattr(os, "sched_getaffinity")
    processors = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def image_shape(config) -> tuple[int, int, int]:
    """(C, H, W) of the configured images."""
    return config.data.num_channels, config.data.image_size, config.data.image_size


def get_data_scaler(config) -> Callable[[Tensor], Tensor]:
    """From [0, 1] to what the network sees: [-1, 1] with `data.centered`, else unchanged."""
    return (lambda x: 2 * x - 1) if config.data.centered else (lambda x: x)


def get_data_inverse_scaler(config) -> Callable[[Tensor], Tensor]:
    """The inverse of `get_data_scaler`."""
    return (lambda x: (x + 1) / 2) if config.data.centered else (lambda x: x)


def batch_at(data: Tensor | Labelled | Stream, index: Tensor | slice) -> Batch:
    """The uint8 images of `index`, and their labels where the data have any."""
    if isinstance(data, Stream):
        return data.batch(index)
    return Batch(data[index], data.labels[index] if isinstance(data, Labelled) else None)


def in_order(data: Tensor | Labelled | Stream, size: int) -> Iterator[Batch]:
    """Every image once, in uint8 batches of `size` and a last one of what is left."""
    return _fetched(data, torch.arange(len(data)).split(size))


def mean_norm(data: Tensor | Labelled | Stream, scaler: Callable[[Tensor], Tensor]) -> float:
    """Mean Euclidean norm of the scaled images of a data set."""
    total, at_once = 0.0, max(1, SMALL // data[:1].numel())
    for batch in in_order(data, at_once):
        total += scaler(batch.images / 255).flatten(1).norm(dim=1).sum().item()
    return total / len(data)


def shuffled_batches(
    data: Tensor | Labelled | Stream,
    batch_size: int,
    seed: int,
    step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Endless uint8 batches from batch number `step` on.

    Every epoch is a permutation given by (seed, epoch); a batch that crosses its end goes on in the
    next one, so that no image is left out. A batch has `batch_size` images, or the whole data set
    where that is smaller. Process r of n, `shard=(r, n)`, gets the r-th of n equal shards of each;
    ValueError where they cannot be equal.
    """
    size, (rank, world) = min(batch_size, len(data)), shard
    if size % world:
        raise ValueError(f"a batch of {size} images cannot be shared equally by {world} processes")
    own = slice(rank * size // world, (rank + 1) * size // world)
    indices = (batch[own] for batch in _shuffled(len(data), size, seed, step))
    return _fetched(data, indices)


def _shuffled(n: int, size: int, seed: int, step: int) -> Iterator[Tensor]:
    orders: dict[int, Tensor] = {}
    for first in itertools.count(step * size, size):
        epochs = range(first // n, (first + size - 1) // n + 1)
        orders = {e: orders[e] if e in orders else _order(n, seed, e) for e in epochs}
        starts = {e: first - e * n for e in epochs}
        yield torch.cat([orders[e][max(at, 0) : at + size] for e, at in starts.items()])


def _fetched(data: Tensor | Labelled | Stream, indices: Iterable[Tensor]) -> Iterator[Batch]:
    if isinstance(data, Stream):
        return data.batches(indices)
    resident = Batch(data.images, data.labels) if isinstance(data, Labelled) else Batch(data)
    device = resident.images.device
    indices = (index.to(device, non_blocking=True) for index in indices)
    return map(lambda i: resident.map(lambda rows: rows.index_select(0, i)), indices)


def _order(n: int, seed: int, epoch: int) -> Tensor:
    random = np.random.default_rng(keyed_seed("order", seed, epoch))
    return torch.from_numpy(random.permutation(n))


def to_unit_interval(
    images: Tensor,
    generator: torch.Generator | None = None,
    flip: bool = False,
    dequantize: bool = False,
) -> Tensor:
    """Float images (B, C, H, W) in [0, 1] from uint8 ones, on their device.

    `flip` mirrors each left to right with probability 1/2. `dequantize` adds uniform noise within a
    grey level, (images + u) / 256; the density of such data bounds the likelihood of the discrete
    ones (Theis et al. 2016).
    """
    draw = {"generator": generator, "device": images.device}
    if flip:
        mirrored = torch.rand(len(images), 1, 1, 1, **draw) < 0.5
        mask = mirrored.to(torch.uint8).neg()  # 255 or 0
        # torch.where(mirrored, images.flip(-1), images), which takes four times as long on a CPU
        images = images.flip(-1).bitwise_xor_(images).bitwise_and_(mask).bitwise_xor_(images)
    if dequantize:
        return torch.rand(images.shape, **draw).add_(images).div_(256)
    return images.float().div_(255)  # in place: fresh memory takes longer than the division


def get_preparation(config, shared: bool) -> Callable[[Batch, torch.Generator], Batch]:
    """`prepare(batch, generator)`: what a training step makes of uint8 images.

    They are mirrored, dequantised, scaled and transformed as `config` asks. With `shared` the
    transformation is the same for the whole batch (see `sources.augmentation.augment`).

    Raises:
        ValueError: the network does not take the labels of the augmentation.
    """
    data, probability = config.data, config.training.augment
    if probability and config.model.augment_dim != augmentation.LABELS:
        raise ValueError(
            f"training.augment={probability} needs model.augment_dim={augmentation.LABELS}, the "
            f"entries of its labels, not {config.model.augment_dim}"
        )
    scaler = get_data_scaler(config)
    flip = data.random_flip and not probability  # the augmentation mirrors them, and tells so

    def prepare(batch: Batch, generator: torch.Generator) -> Batch:
        images = to_unit_interval(batch.images, generator, flip, data.uniform_dequantization)
        batch = replace(batch, images=scaler(images))
        if not probability:
            return batch
        return augmentation.augment(batch, probability, shared, generator)

    return prepare
