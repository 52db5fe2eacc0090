"""The protocol of a source of images, and classes to build one."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # (H, W, C)
MOST_CLASSES = 10**6  # that a data set may have


class Unreadable(ValueError):
    """An image that is damaged, missing or larger than it may be."""


@dataclass(frozen=True)
class Classes:
    """The class `labels` (n,) of n images, numbered from 0, and the `names` of the classes, if any.

    The label of a damaged record, whose image cannot be read either, is -1. Labels of any integers
    become int64; ValueError where they are none, or no numbers of classes.
    """

    labels: NDArray[np.int64]
    names: tuple[str, ...] = ()

    def __post_init__(self):
        labels, classes = np.asarray(self.labels), len(self.names) or MOST_CLASSES
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            form = f"{labels.dtype} {labels.shape}"
            raise ValueError(f"class labels must be whole numbers (n,), not {form}")
        ends = [int(labels.min()), int(labels.max())] if len(labels) else []
        for label in ends:  # compared before they become int64, as which they could wrap
            if not -1 <= label < classes:
                says = f"classes are numbered from 0 to {classes - 1:,}"
                raise ValueError(f"a class label is {label}; {says}")
        object.__setattr__(self, "labels", labels.astype(np.int64))


def spread(number: int, most: int) -> list[int]:
    """Up to `most` of the numbers from 0 to below `number`, spread evenly, with both ends."""
    return np.linspace(0, number - 1, min(number, most)).astype(int).tolist()


class Source(Protocol):
    """A sequence of images, each read when it is indexed.

    A source may have `digest()`, a string that identifies these images in this order without
    decoding them all; without it, the number of images and 64 of them identify the source
    (`digests.of_source`).

    A source with class labels also has `classes()`, which reads them (`Classes`), and raises
    ValueError where one is missing. It is called only if `data.num_classes` is not 0.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Picture:
        """Image i, uint8 (H, W, C); where it cannot be read, `Unreadable`, which names it."""
        ...


class PerProcess:
    """An open file or sequence, which each process gets by a call of `open()` of its own.

    Forked processes share the position in an open file, and have none of the threads of its reader.
    The parent's file stays open in them, because closing it needs these threads.
    """

    def __init__(self, open: Callable):
        self._open, self._opened = open, {}

    def __call__(self):
        process = os.getpid()
        if process not in self._opened:
            self._opened[process] = self._open()
        return self._opened[process]

    def __len__(self) -> int:
        return len(self())

    def __getitem__(self, i: int):
        return self()[i]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}


@dataclass(frozen=True)
class View:
    """The images `index` of a source, each converted by `prepare`.

    `classes_of_all` reads the classes of all images of the source, if it has any. `digest_of` gives
    the digest of the images of an index (`digests.of_source`).
    """

    source: Source
    prepare: Callable[[Picture], Picture]
    index: NDArray[np.int64]
    classes_of_all: Callable[[], Classes] | None = None
    digest_of: Callable[[NDArray[np.int64]], str] | None = None

    def __getstate__(self) -> dict:
        """The images alone, which are all that a worker process reads."""
        return self.__dict__ | {"classes_of_all": None, "digest_of": None}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Picture:
        return self.prepare(self.source[int(self.index[i])])

    def classes(self) -> Classes:
        """The classes of the images `index`; ValueError where an image has none."""
        if self.classes_of_all is None:
            raise ValueError("it has none")
        all_classes = self.classes_of_all()
        return Classes(all_classes.labels[self.index], all_classes.names)
