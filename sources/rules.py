"""Rules on which files of a folder or zip are data: the present ones, and those of older runs.

A run keeps the rules that it began with (`data.rules`), since others would change its data.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sources import labels, listing, splits
from sources.listing import Listing, Omitted


@dataclass(frozen=True)
class Rules:
    """A version of the rules.

    Attributes:
        suffixes: of image files.
        list_folder: the images of a folder.
        list_zip: the images among the names in a zip.
        clean: the name of an image, from its path in a `dataset.json`.
        find_splits: see `splits.find_splits`.
        held_out: indices of a split, "train" or "test", of images that nobody has split.
        class_order: sort key of the names of classes.
    """

    suffixes: Sequence[str]
    list_folder: Callable[[Path], Listing]
    list_zip: Callable[[Iterable[str]], Listing]
    clean: Callable[[str], str]
    find_splits: Callable[[Iterable[str]], dict[str, str]]
    held_out: Callable[[Sequence[str], str], NDArray[np.int64]]
    class_order: Callable[[str], Any]


# --- the first rules ------------------------------------------------------------------------------

FIRST_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FIRST_TEST_NAMES = ("test", "validation", "valid", "val")  # the first one that is present counts


def _list_folder(root: Path) -> Listing:
    """Image files by their names as they are; links to folders are not followed."""
    omitted = Omitted()
    return _listing(_files_below(root, omitted), omitted)


def _list_zip(names: Iterable[str]) -> Listing:
    return _listing((name for name in set(names) if not name.endswith("/")), Omitted())


def _files_below(root: Path, omitted: Omitted) -> Iterator[str]:
    for folder, folders, files in os.walk(root, onerror=_raise):
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                omitted["link{s} to folders", name] += 1
        below = Path(folder).relative_to(root)
        yield from ((below / file).as_posix() for file in files)


def _raise(error: OSError) -> None:
    raise error


def _listing(paths: Iterable[str], omitted: Omitted) -> Listing:
    images, others = {}, {}
    for path in paths:
        name = path.rpartition("/")[2]
        is_image = name.lower().endswith(FIRST_SUFFIXES) and not name.startswith(".")
        (images if is_image else others)[path] = path
    return Listing.build(images, others, omitted)


def _find_splits(names: Iterable[str]) -> dict[str, str]:
    by_lower = {name.lower(): name for name in sorted(set(names))}
    test = [by_lower[name] for name in FIRST_TEST_NAMES if name in by_lower]
    return {"train": by_lower["train"], "test": test[0]} if "train" in by_lower and test else {}


def _held_out(names: Sequence[str], split: str) -> NDArray[np.int64]:
    return splits.held_out(len(names), split)


NEWEST = 2
RULES = {
    1: Rules(
        suffixes=FIRST_SUFFIXES,
        list_folder=_list_folder,
        list_zip=_list_zip,
        clean=str,
        find_splits=_find_splits,
        held_out=_held_out,
        class_order=str,
    ),
    2: Rules(
        suffixes=listing.SUFFIXES,
        list_folder=listing.list_folder,
        list_zip=listing.list_zip,
        clean=listing.clean,
        find_splits=splits.find_splits,
        held_out=splits.held_out_by_name,
        class_order=labels.natural,
    ),
}
