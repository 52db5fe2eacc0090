"""The user's own images: a folder or zip of image files, an .npy or an .npz."""

import functools
import logging
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from configs.keys import with_home
from configs.schema import Either, Key, Number, Numbers, OneOf, Text, whole
from sources import arrays, digests, labels, listing, splits
from sources.arrays import Arrays, is_array, read_array
from sources.base import Classes, PerProcess, Picture, Source, View
from sources.files import Files, Measured, open_below, open_in, read_bounded
from sources.images import cropped_then_resized, to_size
from sources.rules import NEWEST, RULES, Rules
from sources.sixteen_bits import Range
from storage.files import MAX_JSON, one_line

log = logging.getLogger(__name__)

LABEL_BYTES = 32  # of an image's line in a dataset.json, besides its name

KEYS = {  # for image files of data, and of other keys such as sampling.encode
    "data.scale": Key(
        (),
        Either(Numbers(Number(-1e9, 1e9), (0, 2), rising=True), OneOf(("channels", "all"))),
        "of 16-bit image files: the values (low, high) that become black and white; (): measured, "
        "(0, 2^b - 1) for the b bits of the largest value. Of arrays in units of their own: what "
        "data.mean and data.std are measured of, 'channels' (or ()) each by itself, 'all' all "
        "together; (low, high) become -1 and 1",
    ),
}


def open_folder(data: ConfigDict, split: str) -> Source:
    """The images at `data.path`: files of a folder or a zip, or arrays of an .npy or an .npz.

    See `sources.listing` for which files count, `sources.splits` for what is tested on, and
    `sources.labels` for class labels; of an .npz they are the array `labels`, or `train_labels` and
    `test_labels`. With a `data.num_channels` of 0 a file gives as many as it needs (see
    `decode_image`), an array those it has.

    Raises ValueError or OSError where there is nothing to read, or not what it should be.
    """
    return find(data).open(data, split)


open_folder.keys = arrays.KEYS | {
    "data.path": Key(
        "",
        Text(),
        "of 'folder': a folder or .zip of images, an .npy or .npz",
        of_machine="file",
    ),
    "data.rules": Key(
        0,
        whole(0, 2),
        "of 'folder': rules on which files are data, and how a tenth is held out; 1: the first "
        "ones, for old runs; 2: those of docs/architecture.md; 0: the newest, which a run keeps",
        before=1,
    ),
}


def find(data: ConfigDict) -> "Folder | Arrays":
    """The images at `data.path`, which open either split; raises as `open_folder`."""
    if not data.path:
        kinds = "a folder or .zip of images, .npy or .npz"
        raise ValueError(f"data.dataset='folder' needs data.path, {kinds}")
    path, rules = Path(with_home("data.path", data.path)), RULES[data.rules or NEWEST]
    if not path.exists():
        raise FileNotFoundError(f"data.path={data.path} does not exist")
    return Arrays(path, rules) if is_array(path) else Folder(path, rules)


class Folder:
    """The image files of a folder or zip, listed once for both splits.

    Attributes:
        names: of all files, of either split, in order.
        files: their images.
        listing: where they are stored, and what is omitted.
        split_names: names of the folders that hold the splits; {} without any.
    """

    def __init__(self, path: Path, rules: Rules, key: str = "data.path"):
        """List the files at `path`, the value of `key`; ValueError where there are no images."""
        self.path, self._rules, self._archive = path, rules, None
        self._measured: Measured | None = None
        if path.is_file():
            self._archive = archive = PerProcess(partial(zipfile.ZipFile, path))
            try:
                names = archive().namelist()
            except Exception as error:  # a damaged directory makes it fail in any way
                says = f"no folder, .npy, .npz or zip file: {one_line(error)}"
                if listing.is_image(path.name):
                    says = f"one image: name the folder with all of them, such as {path.parent}"
                raise ValueError(f"{key}={path} is {says}") from error
            self.listing, opener = rules.list_zip(names), partial(open_in, archive)
        else:
            self.listing, opener = rules.list_folder(path), partial(open_below, path)
        self.names = [*self.listing.files]
        self.files = Files(path, [*self.listing.files.values()], opener)
        if not self.names:
            words = listing.in_words(self.listing.omitted)
            beside = f"; left out: {words}" if words else ""
            raise ValueError(f"{key}={path} holds no images ({', '.join(rules.suffixes)}){beside}")

    @functools.cached_property
    def _tops(self) -> list[str]:
        """The top folder of each file, "" on top; the one below where a single folder holds all."""
        pieces = [name.split("/", 2) for name in self.names]
        level = 1 if len({p[0] for p in pieces}) == 1 else 0
        return [p[level] if len(p) > level + 1 else "" for p in pieces]

    @functools.cached_property
    def split_names(self) -> dict[str, str]:
        return self._rules.find_splits(self._tops)

    def _is_in(self, split_names: Iterable[str]) -> list[bool]:
        lower = {name.lower() for name in split_names}
        return [top.lower() in lower for top in self._tops]

    @property
    def omitted(self) -> str:
        """Text on what is omitted, such as "30 .txt, 2 hidden folders (.git, .trash)"."""
        beside = listing.beside_splits("image", self._tops, self.split_names)
        return listing.in_words(self.listing.omitted + beside)

    def measure_scale(self, watch: Callable[[Iterable[int]], Iterable[int]] = iter) -> Measured:
        """The scale of 16-bit images, measured at the first call; see `Files.measure_scale`."""
        if self._measured is None:
            self._measured = self.files.measure_scale(watch)
        return self._measured

    def open(self, data: ConfigDict, split: str) -> View:
        """The images of `split`; ValueError for too few, or for channels that no file has."""
        if data.num_channels not in (0, 1, 3):
            raise ValueError(f"data.num_channels must be 1 or 3, not {data.num_channels}")
        if self.split_names:
            index = np.flatnonzero(self._is_in([self.split_names[split]]))
        else:
            index = self._rules.held_out(self.names, split)
            if names := splits.lookalikes(self._tops):
                _warn_of_splits(self.path, *names)
        scale = tuple(data.scale) or self.measure_scale().scale
        return View(
            source=replace(self.files, channels=data.num_channels, scale=scale),
            prepare=to_size(cropped_then_resized, data.image_size),
            index=index,
            classes_of_all=lambda: self._classes,
            digest_of=partial(self._digest, data.digest == "content", bool(data.num_classes)),
        )

    def _digest(self, content: bool, labelled: bool, index: NDArray[np.int64]) -> str:
        """The digest of the files number `index`, and of a `dataset.json` if they are `labelled`.

        Without `content` no file of a folder is read; see `digests.of_files`.
        """
        names = [self.files.names[i] for i in index]
        if labelled and self.listing.metadata:
            names.append(self.listing.metadata[1])
        if self._archive is None:
            return digests.of_files(self.path, names, content, 4 * len(self.names))
        return digests.of_entries(self._archive(), names)

    @functools.cached_property
    def _classes(self) -> Classes:
        """Classes of all files, read once; those of a split must have one."""
        names, metadata, where = self.names, self.listing.metadata, f"data.path={self.path}"
        in_split = names
        if self.split_names:
            is_in = self._is_in(self.split_names.values())
            in_split = [name for name, included in zip(names, is_in, strict=True) if included]
        if metadata:
            above = metadata[0].removesuffix(listing.METADATA)
            lines = sum(len(name) + LABEL_BYTES for name in names)  # ImageNet's take 40 MB
            try:
                with self.files.open(metadata[1]) as file:
                    content = read_bounded(file, MAX_JSON + lines)
                classes = labels.of_metadata(names, content, lambda n: above + self._rules.clean(n))
            except Exception as error:  # a damaged file fails in any way
                raise ValueError(
                    f"{where}: {metadata[0]} gives no class labels: {one_line(error)}"
                ) from error
        else:
            order = self._rules.class_order
            classes = labels.of_folders(names, in_split, bool(self.split_names), order)
        labels.check(where, names, classes, in_split)
        return classes


@functools.cache  # once for each place
def _warn_of_splits(path: Path, *names: str) -> None:
    log.warning(
        f"data.path={path}: {' and '.join(names)} look like a split but are not known as one, "
        "so images of both are trained and tested on; folders 'train' and 'test' are a split"
    )


def read_images(
    key: str, name: str, channels: int, scale: Range | tuple[()] = ()
) -> dict[str, Picture]:
    """The images of a file, a folder, a .zip or an array file by their names, in their order.

    `key` is the key with the value `name`; `channels` and `scale` are those of `decode_image`, but
    a scale of () is measured on all images. Files follow the rules of data, and the log says which
    are left out. See `arrays.read_array` for an .npy or .npz.

    Raises FileNotFoundError where `name` does not exist, ValueError where an image cannot be read.
    """
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"{key}={name} does not exist")
    if path.is_file() and is_array(path):
        return read_array(key, path, channels)
    if channels not in (0, 1, 3):
        says = f"an .npy or .npz, uint8 (n, H, W, {channels})"
        raise ValueError(f"{key}={name}: images of {channels} channels are given as {says}")
    if path.is_file() and listing.is_image(path.name):
        names, files = (
            [path.name],
            Files(path.parent, [path.name], partial(open_below, path.parent)),
        )
    else:
        folder = Folder(path, RULES[NEWEST], key)
        names, files = folder.names, folder.files
        if words := listing.in_words(folder.listing.omitted):
            log.info(f"{key}={name}: left out: {words}")
    files = replace(files, channels=channels, scale=tuple(scale) or files.measure_scale().scale)
    return {name: files[i] for i, name in enumerate(names)}
