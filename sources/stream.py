"""Data sets with random access, in memory or on disk, and a deterministic stream of batches.

A data set is a tensor, with conditions `Resident`, or a `Stream` from disk: all have `len()`, and
indexing by an integer tensor or a slice gives images (k, C, H, W) of the stored type, uint8 or one
of `sources.dtypes.held`. Order and noise depend on (seed, step) alone, so the batches can start
anywhere and do not depend on which process decodes them.
"""

import collections
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from sources.base import Source, Unreadable
from sources.batch import Batch, Conditions
from sources.dtypes import held
from sources.keyed import keyed_seed
from storage.files import one_line

log = logging.getLogger(__name__)

MAX_TRIES = 1000  # images in a row that may be unreadable
MAX_NAMED = 20  # unreadable images that the log names
MAX_WORKERS = 8  # with data.num_workers=-1
SMALL = 2**24  # bytes of images that one process decodes faster than worker processes start


@dataclass(frozen=True)
class Resident:
    """Images in memory as stored, (n, C, H, W), and conditions; indexing gives the images alone."""

    images: Tensor
    conditions: Conditions = field(default_factory=Conditions)
    names: tuple[str, ...] = ()  # of classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.images[index]

    @property
    def labels(self) -> Tensor | None:
        """Class labels (n,), int64; None where there are none."""
        return self.conditions.get("class_labels")

    def to(self, device: torch.device | str) -> "Resident":
        conditions = self.conditions.map(lambda rows: rows.to(device))
        return Resident(self.images.to(device), conditions, self.names)

    def batch(self, index: Tensor | slice) -> Batch:
        """The images of `index`, and their conditions."""
        return Batch(self.images, self.conditions)[index]

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """`self.batch(index)` for each index, which is copied to the images' device."""
        return map(self._select, indices)

    def _select(self, index: Tensor) -> Batch:
        index = index.to(self.images.device, non_blocking=True)
        return Batch(self.images, self.conditions).map(lambda rows: rows.index_select(0, index))


class Reading(NamedTuple):
    """Images (k, C, H, W), their numbers, why some are replaced, and conditions read with them."""

    images: Tensor
    numbers: list[int]
    unreadable: dict[int, str]
    beside: dict[str, Tensor]


@dataclass(eq=False)
class Stream:
    """Images that stay on disk and are decoded when they are indexed.

    An image that cannot be read, or has another shape, is replaced by the next one that can be
    used, and is named in a warning; so length and order do not depend on when damage is noticed.

    Attributes:
        shape: (C, H, W) of an image.
        workers: processes that decode the batches of `batches`; 0: the calling one does.
        conditions, names: conditions of the images, and names of their classes.
        read_beside: sources of conditions, by name, that are read from disk with the images.
        pinned: batches are in memory that is copied to a GPU while it computes.
        unreadable: why an image could not be read, by its number, so far.
    """

    source: Source
    shape: tuple[int, int, int]
    workers: int = 0
    conditions: Conditions = field(default_factory=Conditions)
    names: tuple[str, ...] = ()
    read_beside: Mapping[str, Source] = field(default_factory=dict)
    pinned: bool = False
    unreadable: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.batch(index).images

    @property
    def labels(self) -> Tensor | None:
        """Class labels (n,), int64; None where there are none."""
        return self.conditions.get("class_labels")

    def batch(self, index: Tensor | slice) -> Batch:
        """The images of `index`, and their conditions."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        return self._accept(self.read(index.tolist()))

    def to(self, device: torch.device | str) -> "Stream":
        """Prepare the batches for `device`; returns the stream itself."""
        self.pinned = torch.device(device).type == "cuda"
        return self

    def read(self, index: list[int]) -> Reading:
        """Read the images of `index` and what lies beside them; replace those that cannot be.

        They are read in the order of the source, where neighbours may be decoded together.
        """
        unreadable: dict[int, str] = {}
        readings = {i: self._readable(i, unreadable) for i in sorted(index)}
        numbers, *arrays = zip(*(readings[i] for i in index), strict=True)
        images, *beside = (torch.from_numpy(np.stack(each)) for each in arrays)
        named = dict(zip(self.read_beside, beside, strict=True))
        return Reading(images, list(numbers), unreadable, named)

    def _readable(self, i: int, unreadable: dict[int, str]) -> tuple[int, *tuple[np.ndarray, ...]]:
        """The number of an image from `i` on, the image (C, H, W), what is read beside it."""
        tries = min(len(self), MAX_TRIES)
        for j in ((i + k) % len(self) for k in range(tries)):
            try:
                image = held(self.source[j]).transpose(2, 0, 1)
                beside = [each[j].transpose(2, 0, 1) for each in self.read_beside.values()]
            except Unreadable as error:
                unreadable[j] = str(error)
                continue
            if image.shape == self.shape:
                return j, image, *beside
            unreadable[j] = (
                f"number {j} is {image.shape} (C, H, W), but data.num_channels and "
                f"data.image_size say {self.shape}"
            )
        raise ValueError(f"{tries} images in a row cannot be used; the last: {unreadable[j]}")

    def _accept(self, reading: Reading) -> Batch:
        images, numbers, unreadable, beside = reading
        for i in unreadable.keys() - self.unreadable.keys():
            self.unreadable[i] = unreadable[i]
            if len(self.unreadable) <= MAX_NAMED:
                log.warning(f"unreadable image: {unreadable[i]}")
            if len(self.unreadable) == MAX_NAMED:
                log.warning("further unreadable images are not named")
        return Batch(images, self.conditions.map(lambda rows: rows[numbers]) | beside)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """`self.batch(index)` for each index, decoded ahead by the worker processes."""
        if not self.workers:
            yield from (self.batch(index) for index in indices)
            return
        indices, pending = iter(indices), collections.deque()
        # A fork of this process would lack the threads that CUDA and ArrayRecord need. Workers are
        # therefore forked from a server that has only imported their modules.
        context = multiprocessing.get_context("forkserver")
        # In Python 3.11 the server can import this module only from its working folder; PyTorch it
        # always finds.
        context.set_forkserver_preload([__name__, "torch.utils.data"])

        def requests() -> Iterator[list[int]]:
            for index in indices:
                pending.append(index)
                yield index.tolist()

        loader = DataLoader(
            _Reader(self),
            batch_size=None,
            sampler=requests(),
            num_workers=self.workers,
            pin_memory=self.pinned,
            generator=torch.Generator(),  # the global generator is for dropout
            worker_init_fn=_follow_parent,
            multiprocessing_context=context,
        )
        batches = iter(loader)
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:  # a signal to the group, for example
                reason = one_line(error)
                log.warning(f"the processes that decode images died; going on without: {reason}")
                yield from (self.batch(index) for index in itertools.chain(pending, indices))
                return
            if batch is None:
                return
            if isinstance(batch, Exception):
                # The error's traceback holds this frame, and the frame the error: a cycle. Workers
                # in one end only after 5 s each, when it is collected.
                del batches
                raise batch
            pending.popleft()
            yield self._accept(batch)


class _Reader:
    """`Stream.read` for DataLoader; it returns errors, so that they keep type and message."""

    def __init__(self, stream: Stream):
        beside = stream.read_beside  # workers need no other conditions
        self.stream = Stream(stream.source, stream.shape, read_beside=beside)

    def __getitem__(self, index: list[int]):
        try:
            return self.stream.read(index)
        except Exception as error:
            return error


def _follow_parent(worker: int) -> None:
    """Make a worker ignore what a terminal sends to the whole group, and end with its parent.

    DataLoader watches the process that forked the worker. Here this is the server, which would wait
    for its workers for ever after the training process is killed.
    """

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


DataSet = Tensor | Resident | Stream


def resident(stream: Stream, limit: int) -> DataSet:
    """The images of `stream` in memory, decoded, if they take at most `limit` bytes, else `stream`.

    ValueError where no image can be used.
    """
    first = stream.read([0])
    size = len(stream) * sum(rows.nbytes for rows in (first.images, *first.beside.values()))
    if size > limit:
        return stream
    if size <= SMALL:
        stream.workers = 0
    return decode(stream)


def decode(stream: Stream) -> Tensor | Resident:
    """Read all images of `stream` that can be read, (n, C, H, W), with their conditions."""
    first = stream.read([0])
    images = first.images.new_empty(len(stream), *stream.shape)
    beside = {
        name: row.new_empty(len(stream), *row.shape[1:]) for name, row in first.beside.items()
    }
    interval = 0.2 if sys.stderr and sys.stderr.isatty() else 10
    options = {"delay": 1, "mininterval": interval, "disable": not distributed.is_main()}
    with tqdm(total=len(stream), desc="decoding", **options) as progress:
        for start, batch in zip(range(0, len(stream), 64), in_order(stream, 64), strict=True):
            images[start : start + 64] = batch.images
            for name, rows in beside.items():
                rows[start : start + 64] = batch.conditions[name]
            progress.update(len(batch))
    conditions = stream.conditions | beside
    if stream.unreadable:
        readable = torch.ones(len(stream), dtype=torch.bool)
        readable[list(stream.unreadable)] = False
        log.warning(f"{len(stream.unreadable)} of {len(stream)} images are unreadable and left out")
        images, conditions = images[readable], conditions.map(lambda rows: rows[readable])
    return Resident(images, conditions, stream.names) if conditions else images


def processors() -> int:
    """Number of processors for this process, if several were started on this machine.

    The numbers of processes are those of torchrun and of Open MPI; srun binds each task to its own
    processors.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    processors = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    names = "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"
    return max(1, processors // max(int(os.environ.get(name, "1")) for name in names))


def batch_at(data: DataSet, index: Tensor | slice) -> Batch:
    """The images of `index` as stored, and their conditions."""
    return _batched(data).batch(index)


def in_order(data: DataSet, size: int) -> Iterator[Batch]:
    """Every image once, as stored, in batches of `size`; the last one may be smaller."""
    return _batched(data).batches(torch.arange(len(data)).split(size))


def shuffled_batches(
    data: DataSet,
    batch_size: int,
    seed: int,
    step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Endless batches of images as stored, from batch number `step` on.

    Every epoch is a permutation determined by (seed, epoch); a batch that crosses the end of an
    epoch continues in the next, so that no image is left out. A batch has `batch_size` images, or
    the whole data set where that is smaller. Process r of n, `shard=(r, n)`, gets the r-th of n
    equal shards of each; ValueError where they cannot be equal.
    """
    size, (rank, world) = min(batch_size, len(data)), shard
    if size % world:
        raise ValueError(f"a batch of {size} images cannot be shared equally by {world} processes")
    part = slice(rank * size // world, (rank + 1) * size // world)
    indices = (batch[part] for batch in _shuffled(len(data), size, seed, step))
    return _batched(data).batches(indices)


def _batched(data: DataSet) -> Resident | Stream:
    return Resident(data) if isinstance(data, Tensor) else data


def _shuffled(n: int, size: int, seed: int, step: int) -> Iterator[Tensor]:
    orders: dict[int, Tensor] = {}
    for first in itertools.count(step * size, size):
        epochs = range(first // n, (first + size - 1) // n + 1)
        orders = {e: orders[e] if e in orders else _order(n, seed, e) for e in epochs}
        starts = {e: first - e * n for e in epochs}
        yield torch.cat([orders[e][max(at, 0) : at + size] for e, at in starts.items()])


def _order(n: int, seed: int, epoch: int) -> Tensor:
    random = np.random.default_rng(keyed_seed("order", seed, epoch))
    return torch.from_numpy(random.permutation(n))
