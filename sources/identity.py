"""The identity of data, by which a run recognises the data it began with, and of a data set."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

import distributed
from configs.keys import shown
from configs.schema import EXACT
from sources import digests
from sources.base import Classes, spread
from sources.stream import DataSet, Resident, Stream

KINDS = ("content", "names")  # of digests: data.digest
MAX_CLASSES = 100_000  # whose names a run stores; with more, only the digest covers them
MAX_NAME = 4096  # letters of the name of a class
MAX_SHOWN = 5  # classes that a message names


@dataclass(frozen=True)
class Identity:
    """Identity of data.

    Attributes:
        train, test: numbers of images of the splits.
        classes: names by class number; empty where no classes are read or they have no names.
        digest: its kind, one of `KINDS`, a colon, and a SHA-256.
    """

    train: int
    test: int
    classes: tuple[str, ...]
    digest: str

    @classmethod
    def read(cls, path: Path, checkpoint: dict) -> Self | None:
        """The identity in the entry `data` of `checkpoint`, from `path`; None without the entry.

        Raises ValueError where the entry is something else.
        """
        entry = checkpoint.get("data")
        if entry is None:
            return None
        try:
            return cls(**_checked(entry))
        except ValueError as error:
            raise ValueError(f"{path}: its data are no identity of data: {error}") from None

    def entry(self) -> dict[str, Any]:
        """The entry of a checkpoint for `read`: a dictionary of numbers, strings and a list."""
        return asdict(self) | {"classes": [*self.classes] if _are_names(self.classes) else []}

    def comparable(self, other: Self) -> bool:
        """True if the digests are of one kind."""
        return self.digest.partition(":")[0] == other.digest.partition(":")[0]

    def changes(self, now: Self) -> str:
        """Text on how the data `now` differ from these; empty where they do not.

        If the digests are not comparable, a change of contents alone goes unseen.
        """
        numbers = (self.train, self.test), (now.train, now.test)
        if numbers[0] == numbers[1] and self.digest == now.digest:
            return ""
        changes = []
        if numbers[0] != numbers[1]:
            then, today = (f"{train:,} to train and {test:,} to test on" for train, test in numbers)
            changes.append(f"{then} then, {today} now")
        if missing := sorted(set(self.classes) - set(now.classes)):
            changes.append(f"gone: {_named(missing)}")
        if new := self.new_classes(now.classes):
            changes.append(f"new: {_named(new)}")
        if not changes and self.comparable(now):
            changes.append("as many images as then, but other contents or names of files")
        return "; ".join(changes)

    def new_classes(self, names: Sequence[str]) -> list[str]:
        """Classes among `names` that the run does not have; [] where its own have no names."""
        return sorted(set(names) - set(self.classes)) if self.classes else []

    def renumbered(self, classes: Classes) -> Classes:
        """`classes` with the numbers of this identity's classes; unchanged without names.

        Raises ValueError for a class that the run does not have.
        """
        if not self.classes or not classes.names:
            return classes
        if new := self.new_classes(classes.names):
            raise ValueError(
                f"the network of this run has no number for the {_named(new)}: take away its "
                f"images, or start a new workdir; the run has the {_named(self.classes)}"
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        table = np.array([*(numbers[name] for name in classes.names), -1], np.int64)
        return Classes(table[classes.labels], self.classes)  # -1 of a damaged record stays


def _named(classes: Sequence[str]) -> str:
    names = ", ".join(shown(name) for name in classes[:MAX_SHOWN])
    more = f" and {len(classes) - MAX_SHOWN:,} more" if len(classes) > MAX_SHOWN else ""
    return f"{'classes' if len(classes) > 1 else 'class'} {names}{more}"


def _are_names(names: Sequence[Any]) -> bool:
    """True if `names` is a valid list of class names in a checkpoint."""
    if len(names) > MAX_CLASSES or any(type(n) is not str or len(n) > MAX_NAME for n in names):
        return False
    return len(set(names)) == len(names)


def _checked(entry: Any) -> dict[str, Any]:
    keys = ("train", "test", "classes", "digest")
    if type(entry) is not dict or entry.keys() != set(keys):
        raise ValueError(f"not a dictionary of {', '.join(keys)}")
    for key in ("train", "test"):
        if type(entry[key]) is not int or not 0 < entry[key] < EXACT:
            raise ValueError(f"{key} is no number of images: {shown(entry[key])}")
    names, digest = entry["classes"], entry["digest"]
    if type(names) is not list or not _are_names(names):
        raise ValueError(f"classes is no list of at most {MAX_CLASSES:,} names, each another")
    if type(digest) is not str or not re.fullmatch(rf"({'|'.join(KINDS)}):[0-9a-f]{{64}}", digest):
        raise ValueError(f"digest is none: {shown(digest)}")
    return entry | {"classes": tuple(names)}


def fingerprint(data: DataSet) -> str:
    """Digest (32 hexadecimal digits) of the images of a data set in order, from the main process.

    For images in memory it covers all bytes. For images on disk it covers the digest of their
    source and, since decoding changes them, 64 of them decoded.
    """
    return distributed.from_main(lambda: digest_of(data))


def digest_of(data: DataSet) -> str:
    """The `fingerprint` of `data`, computed in this process."""
    if isinstance(data, Stream):
        samples = data[torch.tensor(spread(len(data), digests.SAMPLES))].numpy()
        return digests.joined(digests.of_source(data.source), digests.of_array(samples))[:32]
    images = data.images if isinstance(data, Resident) else data
    return digests.of_array(images.cpu().contiguous().numpy(), whole=True)[:32]
