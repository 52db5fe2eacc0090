"""The first rules on which files of a folder or zip are data: data.rules=1, for old runs."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sources.base import held_out
from sources.listing import LeftOut, Listed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_NAMES = ("test", "validation", "valid", "val")  # of the test split, the first one counts


def list_folder(root: Path) -> Listed:
    """Image files by their names as they are; links to folders are not followed."""
    left_out = LeftOut()
    return _listed(_files_below(root, left_out), left_out)


def list_names(names: Iterable[str]) -> Listed:
    """Image files among the entries of a zip."""
    return _listed((name for name in set(names) if not name.endswith("/")), LeftOut())


def given_splits(names: Iterable[str]) -> dict[str, str]:
    """Names of the splits among `names`, in any case; {} where there are not both."""
    by_lower = {name.lower(): name for name in sorted(set(names))}
    test = [by_lower[name] for name in TEST_NAMES if name in by_lower]
    return {"train": by_lower["train"], "test": test[0]} if "train" in by_lower and test else {}


def held_out_by_number(names: Sequence[str], split: str) -> NDArray[np.int64]:
    """Indices of `split` where nobody has split the images: "test" is a random tenth of them."""
    return held_out(len(names), split)


def _files_below(root: Path, left_out: LeftOut) -> Iterator[str]:
    for folder, folders, files in os.walk(root, onerror=_raise):
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                left_out["link{s} to folders", name] += 1
        below = Path(folder).relative_to(root)
        yield from ((below / file).as_posix() for file in files)


def _raise(error: OSError) -> None:
    raise error


def _listed(names: Iterable[str], left_out: LeftOut) -> Listed:
    images, others = [], []
    for path in names:
        name = path.rpartition("/")[2]
        is_image = name.lower().endswith(SUFFIXES) and not name.startswith(".")
        (images if is_image else others).append(path)
    return Listed.build({name: name for name in images}, {name: name for name in others}, left_out)
