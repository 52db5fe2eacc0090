"""Class labels of image files: those that come with them, else the folders they lie in."""

import difflib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.keys import shown
from sources.base import MOST_CLASSES, Classes, Source, View
from sources.listing import METADATA

MAX_SHOWN = 5  # names of classes in a message


def of_folders(
    names: Sequence[str], in_split: Sequence[str], below_split: bool, order: Callable[[str], Any]
) -> Classes:
    """Classes of the images `names` by folder: those of the images `in_split`, sorted by `order`.

    The folder of a class is at the top, below a single folder that holds everything, or below the
    folder of its split. A single folder with images and no folders is one class. Images outside
    these classes have the label -1.
    """
    single = len({name.partition("/")[0] for name in names}) == 1
    level = below_split + single
    if single and not below_split and all(_folder_at(n, level) is None for n in names):
        level -= 1
    folders = {name: _folder_at(name, level) for name in names}
    classes = sorted({folders[name] for name in in_split} - {None}, key=order)
    numbers = {name: i for i, name in enumerate(classes)}
    labels = [numbers.get(folders[name], -1) for name in names]
    return Classes(np.array(labels, np.int64), tuple(classes))


def natural(name: str) -> tuple:
    """A sort key that compares numbers in a name as numbers, before text."""
    pieces = re.split(r"([0-9]+)", name)
    pieces[1::2] = [(len(digits := piece.lstrip("0")), digits) for piece in pieces[1::2]]
    return (*pieces,), name


def of_metadata(names: Sequence[str], content: bytes, clean: Callable[[str], str]) -> Classes:
    """Classes of the images `names` by a `dataset.json`, {"labels": [["path", label], ...]}.

    `clean` turns its paths into names. Images that it does not list have the label -1. Raises any
    exception where `content` is damaged.
    """
    labels = json.loads(content)["labels"]
    if not labels:
        raise ValueError("it has no labels")
    for name, label in dict(labels).items():
        if type(name) is not str or type(label) is not int or not 0 <= label < MOST_CLASSES:
            raise ValueError(f"{name!r:.100} has the label {label!r:.50}, no class's number")
    numbers = {clean(name): label for name, label in labels}
    return Classes(np.array([numbers.get(name, -1) for name in names], np.int64))


def numbered(values: Sequence[int | str | None]) -> Classes:
    """Classes of images by the number or the name of each, None for none: the label -1.

    Names are sorted. Raises ValueError where a value is neither, or there are both.
    """
    labels = [value for value in values if value is not None]
    if all(type(label) is str for label in labels):
        names = sorted(set(labels), key=natural)
        numbers = {name: number for number, name in enumerate(names)}
        return Classes(np.array([numbers.get(value, -1) for value in values], np.int64), (*names,))
    for label in labels:
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            raise ValueError(f"{label!r:.50} is no class's number, unlike other labels")
    return Classes(np.array([-1 if value is None else value for value in values], np.int64))


def number_of(name: str, class_names: Sequence[str]) -> int:
    """The number of the class called `name`; ValueError, with some of the names, without it."""
    numbers = {unicodedata.normalize("NFC", each): i for i, each in enumerate(class_names)}
    if (number := numbers.get(unicodedata.normalize("NFC", name))) is not None:
        return number
    near = difflib.get_close_matches(name, class_names, MAX_SHOWN, 0)
    has = f"those called {', '.join(map(repr, near))}" if near else "none with a name"
    raise ValueError(f"class_label={shown(name)} is the name of no class of the run: it has {has}")


def only(source: Source, names: str) -> View:
    """Images of `source` in the classes `names`, separated by commas; classes keep their numbers.

    Classes without names are named by number. Raises ValueError where there are no such classes.
    """
    if not hasattr(source, "classes"):
        raise ValueError(f"data.classes={names!r}: these data have no classes")
    classes = source.classes()
    of_all = classes.names or map(str, range(classes.labels.max() + 1))
    by_name, wanted = {name: i for i, name in enumerate(of_all)}, map(str.strip, names.split(","))
    numbers = [by_name.get(name, -1) for name in wanted]
    if -1 in numbers:
        has = ", ".join([*by_name][:MAX_SHOWN]) + ", ..." * (len(by_name) > MAX_SHOWN)
        raise ValueError(f"data.classes={shown(names)} are not all classes of these data: {has}")
    index = np.flatnonzero(np.isin(classes.labels, numbers))
    if isinstance(source, View):  # conditions and sizes are those of its own source
        return replace(source, index=source.index[index])
    return View(source, np.asarray, index, lambda: classes)


def check(
    where: str, names: Sequence[str], classes: Classes, is_in_split: NDArray[np.bool_]
) -> None:
    """Raise ValueError, which names `where`, if an image of a split (n,) has no label."""
    missing = [names[i] for i in np.flatnonzero(is_in_split & (classes.labels < 0))]
    if missing:
        raise ValueError(
            f"{len(missing):,} of {is_in_split.sum():,} images of {where} have no class label, "
            f"such as {missing[0]}: each class needs a folder, or each image a line in {METADATA}"
        )


def _folder_at(name: str, level: int) -> str | None:
    folders = name.split("/")[:-1]
    return folders[level] if level < len(folders) else None
