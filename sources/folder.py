"""The user's own images, whose layout is recognised by the content or name of `data.path`."""

import contextlib
import functools
import logging
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from configs.keys import with_home
from configs.schema import Either, Key, Number, Numbers, OneOf, Text, whole
from sources import arrays, cifar, idx, labels, listing, parquet, splits, tars
from sources.arrays import Arrays, is_array, read_array
from sources.base import Classes, Source, View
from sources.files import GZIP, Files, Measured, open_below, read_bounded, unpacked
from sources.images import cropped_then_resized, to_size
from sources.loaded import Loaded
from sources.rules import NEWEST, RULES, Rules
from sources.shards import Shards
from sources.sixteen_bits import Range
from sources.stores import InFolder, InZip, Store
from storage.files import MAX_JSON, about, one_line, open_regular

log = logging.getLogger(__name__)

LABEL_BYTES = 32  # of an image's line in a dataset.json, besides its name

KEYS = {  # for image files of data, and of other keys such as sampling.encode
    "data.scale": Key(
        (),
        Either(Numbers(Number(-1e9, 1e9), (0, 2), rising=True), OneOf(("channels", "all"))),
        "of 16-bit image files: the values (low, high) that become black and white; (): measured, "
        "(0, 2^b - 1) for the b bits of the largest value. Of arrays in units of their own: "
        "'channels' (or ()) measures data.mean and data.std of each channel, 'all' of all "
        "together; (low, high) become -1 and 1",
    ),
}


def open_folder(data: ConfigDict, split: str) -> Source:
    """The images at `data.path`: image files, or arrays; docs/data.md has all layouts.

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
        "of 'folder': a folder or .zip of images, an .npy or .npz, .tar, .parquet, or the files of "
        "CIFAR and MNIST; docs/data.md has all layouts",
        of_machine="file",
    ),
    "data.rules": Key(
        0,
        whole(0, 2),
        "of 'folder': rules on which files are data, and how a share is held out; 1: the first "
        "ones, for old runs; 2: those of docs/architecture.md; 0: the newest, which a run keeps",
        before=1,
    ),
    **splits.KEYS,
}


def exists(name: str) -> bool:
    """True if there is something at `name`, the value of `data.path`."""
    name = with_home("data.path", name)
    try:
        return Path(name).exists() or Shards.of_pattern(name) is not None
    except (OSError, ValueError):
        return False


def find(data: ConfigDict) -> "Folder | Arrays | Loaded":
    """The images at `data.path`, which open either split; raises as `open_folder`."""
    if not data.path:
        kinds = "a folder or .zip of images, .npy or .npz"
        raise ValueError(f"data.dataset='folder' needs data.path, {kinds} (docs/data.md has all)")
    path, rules = Path(with_home("data.path", data.path)), RULES[data.rules or NEWEST]
    if not path.exists():
        shards = Shards.of_pattern(str(path))
        if shards is None:
            raise FileNotFoundError(f"data.path={data.path} does not exist")
        return _of_shards(path, rules, shards)
    if is_array(path):
        return Arrays(path, rules)
    if path.is_dir():
        return cifar.in_folder(path) or idx.in_folder(path) or _of_folder(path, rules)
    start = _beginning(path) if path.is_file() else b""
    if idx.is_idx(start):
        return idx.of_file(path)
    if tars.is_tar(start) and (loaded := cifar.in_archive(path)):
        return loaded
    if tars.is_tar(start) or start.startswith(parquet.START):
        return _of_shards(path, rules, Shards.of_file(path))
    return Folder(path, rules)


def _beginning(path: Path) -> bytes:
    """The first 512 bytes of a file, or of what gzip packed into it."""
    with about(path), open_regular(path) as file:
        with contextlib.suppress(OSError, EOFError, zlib.error):
            return unpacked(file).read(512)
        file.seek(0)
        return file.read(512)


def _of_folder(path: Path, rules: Rules) -> "Folder":
    """Image files in a folder, or the tars or parquet files in one without image files."""
    store = InFolder(path, rules)
    for suffix in (".tar", ".parquet") if not store.listing.files else ():
        shards = Shards.below(path, suffix)
        if shards.names:
            return _of_shards(path, rules, shards)
    return Folder(path, rules, store=store)


def _of_shards(path: Path, rules: Rules, shards: Shards) -> "Folder":
    """The images in tar or parquet files, of which the first tells the kind of all."""
    start = _beginning(shards.paths[0])
    with open_regular(shards.paths[0]) as file:
        is_packed = file.read(2) == GZIP
    if is_packed:
        raise ValueError(
            f"data.path={path}: a packed tar file cannot be read at random: unpack it with gunzip, "
            "or extract it into a folder"
        )
    kind = parquet.Parquet if start.startswith(parquet.START) else tars.Tars
    return Folder(path, rules, store=kind(shards, rules))


class Folder:
    """Image files of a folder, zip, tars or parquet files, listed once for both splits.

    Attributes:
        names: of all files, of either split, in order.
        files: their images.
        listing: where they are stored, and what is omitted.
        split_names: names of the folders that hold the splits; {} without any.
        by_name: images are held out by their names.
    """

    def __init__(
        self, path: Path, rules: Rules, key: str = "data.path", store: Store | None = None
    ):
        """List the files at `path`, the value of `key`; ValueError where there are no images.

        They are those of `store`, or of a folder or zip without it.
        """
        if store is None:
            store = InZip(path, rules, key) if path.is_file() else InFolder(path, rules)
        self.path, self._rules, self._store = path, rules, store
        self._measured: Measured | None = None
        self.listing, self.by_name = store.listing, rules is not RULES[1]
        self.names = [*self.listing.files]
        self.files = Files(path, [*self.listing.files.values()], store.open)
        if not self.names:
            words = listing.in_words(self.listing.omitted)
            beside = f"; left out: {words}" if words else ""
            raise ValueError(f"{key}={path} holds no images ({', '.join(rules.suffixes)}){beside}")

    @functools.cached_property
    def _tops(self) -> list[str]:
        """The top folder of each file, "" on top; the one below where a single folder holds all."""
        pieces = [place.split("/", 2) for place in self._store.places]
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
            index = self._rules.held_out(self.names, split, data.held_out, data.groups)
            if names := splits.lookalikes(self._tops):
                _warn_of_splits(self.path, *names)
        files = replace(self.files, channels=data.num_channels, dtype=data.dtype)
        if not data.dtype:
            files = replace(files, scale=tuple(data.scale) or self.measure_scale().scale)
        return View(
            source=files,
            prepare=to_size(cropped_then_resized, 0 if data.dtype else data.image_size),
            index=index,
            classes_of_all=lambda: self._classes,
            digest_of=partial(self._digest, data.digest == "content", bool(data.num_classes)),
        )

    def _digest(self, content: bool, labelled: bool, index: NDArray[np.int64]) -> str:
        """The digest of the files number `index`, and of a `dataset.json` if they are `labelled`.

        Without `content` no file of a folder is read; see `digests.of_files`.
        """
        paths = [self.files.names[i] for i in index]
        if labelled and self.listing.metadata:
            paths.append(self.listing.metadata[1])
        return self._store.digest(paths, content)

    @functools.cached_property
    def _classes(self) -> Classes:
        """Classes of all files, read once; -1 for those in no split, and of a test split in which
        no file has one. The others must have one.
        """
        names, metadata, where = self.names, self.listing.metadata, f"data.path={self.path}"
        places, is_in = self._store.places, np.ones(len(names), bool)
        if self.split_names:
            is_in = np.array(self._is_in(self.split_names.values()))
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
        elif (of_store := self._store.classes()) is not None:
            classes = of_store
        else:
            in_split = [place for place, included in zip(places, is_in, strict=True) if included]
            order = self._rules.class_order
            classes = labels.of_folders(places, in_split, bool(self.split_names), order)
        if self.split_names:
            is_test = np.array(self._is_in([self.split_names["test"]]))
            if (classes.labels[is_test] < 0).all():
                is_in = is_in & ~is_test
        labels.check(where, names, classes, is_in)
        return classes


@functools.cache  # once for each place
def _warn_of_splits(path: Path, *names: str) -> None:
    log.warning(
        f"data.path={path}: {' and '.join(names)} look like a split but are not known as one, "
        "so images of both are trained and tested on; folders 'train' and 'test' are a split"
    )


def read_images(
    key: str, name: str, channels: int, scale: Range | tuple[()] = (), dtype: str = ""
) -> dict[str, NDArray]:
    """Images of a file, a folder, a .zip or an array file, by name, in the order of the source.

    `name` is the value of the key `key`; `channels`, `scale` and `dtype` are those of `Files`, but
    a scale of () is measured on all images. The rules for data files apply, and the log says which
    files are left out. See `arrays.read_array` for an .npy or .npz file.

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
        names = [path.name]
        files = Files(path.parent, names, partial(open_below, path.parent))
    else:
        folder = Folder(path, RULES[NEWEST], key)
        names, files = folder.names, folder.files
        if words := listing.in_words(folder.listing.omitted):
            log.info(f"{key}={name}: left out: {words}")
    files = replace(files, channels=channels, dtype=dtype)
    if not dtype:
        files = replace(files, scale=tuple(scale) or files.measure_scale().scale)
    return {name: files[i] for i, name in enumerate(names)}
