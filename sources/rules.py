"""Rules on which files of a folder or zip are data: the present ones, and those of older runs.

A run keeps the rules that it began with (`data.rules`), since others would change its data.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sources import labels, listing, splits
from sources.listing import Listing, Omitted


@dataclass(frozen=True)
class Rules:
    """A version of the rules."""

    suffixes: Sequence[str]  # of image files
    list_folder: Callable[[Path], Listing]
    list_zip: Callable[[Iterable[str]], Listing]  # of the names in it
    clean: Callable[[str], str]  # the name of an image, from its path in a `dataset.json`
    find_splits: Callable[[Iterable[str]], dict[str, str]]
    # where there are no splits: (names, split, data.held_out, data.groups)
    held_out: Callable[[Sequence[str], str, float, str], NDArray[np.int64]]
    class_order: Callable[[str], Any]  # sort key of the names of classes


# --- the first rules ------------------------------------------------------------------------------

FIRST_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FIRST_TEST_NAMES = ("test", "validation", "valid", "val")  # the first one that is present counts


def _list_folder(root: Path) -> Listing:
    """Image files by their names as they are; links to folders are not followed."""
    omitted, paths = Omitted(), []
    for folder, folders, files in os.walk(root, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        omitted.update(("link{s} to folders", name) for name in links)
        below = Path(folder).relative_to(root)
        paths += [(below / file).as_posix() for file in files]
    return _listing(paths, omitted)


def _raise(error: OSError) -> None:
    raise error


def _list_zip(names: Iterable[str]) -> Listing:
    return _listing([name for name in set(names) if not name.endswith("/")], Omitted())


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


def _held_out(names: Sequence[str], split: str, amount: float, groups: str) -> NDArray[np.int64]:
    return splits.held_out(len(names), split, amount, groups)


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
