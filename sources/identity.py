"""The identity of data: by which a run knows whether it is given those that it began with."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from configs.keys import shown
from configs.schema import EXACT
from sources.base import Classes

KINDS = ("content", "names")  # of digests: data.digest
MAX_CLASSES = 100_000  # whose names a run keeps; the digest counts those of more classes too
MAX_NAME = 4096  # letters of the name of a class
MAX_SHOWN = 5  # classes that a message names


@dataclass(frozen=True)
class Identity:
    """How many images there are, the `classes` in the order of their numbers, and the `digest`.

    `train` and `test` are the numbers of images of the splits. The digest begins with its kind,
    one of `KINDS`. `classes` is empty where none are read, or where they have no names.
    """

    train: int
    test: int
    classes: tuple[str, ...]
    digest: str

    @classmethod
    def read(cls, path: Path, checkpoint: dict) -> Self | None:
        """The identity that `checkpoint`, from `path`, has as `data`; None where it has none.

        Raises:
            ValueError: it has something else there.
        """
        entry = checkpoint.get("data")
        if entry is None:
            return None
        try:
            return cls(**_checked(entry))
        except ValueError as error:
            raise ValueError(f"{path}: its data are no identity of data: {error}") from None

    def entry(self) -> dict[str, Any]:
        """The dictionary that `read` takes, of numbers, strings and a list."""
        return asdict(self) | {"classes": [*self.classes] if _are_names(self.classes) else []}

    def comparable(self, other: Self) -> bool:
        """Whether the digests are of one kind."""
        return self.digest.partition(":")[0] == other.digest.partition(":")[0]

    def changes(self, now: Self) -> str:
        """How the data `now` differ from these, in words; empty where they do not.

        Where the digests are not comparable, other contents alone go unseen.
        """
        numbers = (self.train, self.test), (now.train, now.test)
        if numbers[0] == numbers[1] and self.digest == now.digest:
            return ""
        words = []
        if numbers[0] != numbers[1]:
            then, today = (f"{train:,} to train and {test:,} to test on" for train, test in numbers)
            words.append(f"{then} then, {today} now")
        gone = sorted(set(self.classes) - set(now.classes))
        if gone:
            words.append(f"gone: {_classes(gone)}")
        if new := self.new_classes(now.classes):
            words.append(f"new: {_classes(new)}")
        if not words and self.comparable(now):
            words.append("as many images as then, but other contents or names of files")
        return "; ".join(words)

    def new_classes(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that are no class of a run which has these; none where it has no names.

        Classes of a run may have no names, or are not read.
        """
        return sorted(set(names) - set(self.classes)) if self.classes else []

    def renumbered(self, classes: Classes) -> Classes:
        """`classes` with the numbers that these, of a run, have; unchanged without names.

        Raises:
            ValueError: a class is none of the run's.
        """
        if not self.classes or not classes.names:
            return classes
        if new := self.new_classes(classes.names):
            raise ValueError(
                f"the network of this run has no number for the {_classes(new)}: take away its "
                f"images, or start a new workdir; the run has the {_classes(self.classes)}"
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        table = np.array([*(numbers[name] for name in classes.names), -1], np.int64)
        return Classes(table[classes.labels], self.classes)  # -1, of a damaged record, stays


def _classes(names: Sequence[str]) -> str:
    words = ", ".join(shown(name) for name in names[:MAX_SHOWN])
    more = f" and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return f"{'classes' if len(names) > 1 else 'class'} {words}{more}"


def _are_names(names: Sequence[Any]) -> bool:
    """Whether a checkpoint may have `names` as those of classes."""
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
