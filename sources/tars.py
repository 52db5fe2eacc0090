"""Images in tar files, in WebDataset's naming too: a/0001.jpg with its label in a/0001.cls.

The headers of a file are read once, into an index; then each image is read at its place.
"""

import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sources import listing
from sources.base import Classes
from sources.digests import FRESH, cache_path, joined
from sources.files import MAX_FILE_BYTES, read_bounded
from sources.labels import numbered
from sources.listing import Listing, Omitted
from sources.rules import Rules
from sources.shards import Shards
from storage.files import about, cached, open_regular, refusing

MAX_HEADER = 2**20  # bytes; the long names and attributes of a member
MAX_LABEL = 2**20  # bytes of a .cls or .json file
LARGE = 2**26  # bytes of a file whose index is cached
INDEX = {"names": ("u", (None,)), "places": ("i", (None, 2))}  # arrays of it
LABELS = ("label", "cls", "class")  # keys of a .json file, the first that it has counts


class Tars:
    """The members of tar files that are neither folders nor links.

    Raises ValueError, which names the file, where one is damaged or cut off.
    """

    def __init__(self, shards: Shards, rules: Rules):
        self._shards, omitted = shards, Omitted()
        tops = shards.tops(rules.find_splits)
        self._place: dict[str, tuple[int, int, int]] = {}  # shard, start, size, by name
        places = {}
        paths = tqdm(shards.paths, desc="index", unit="tar", delay=1)
        for number, (path, stem) in enumerate(zip(paths, shards.stems, strict=True)):
            for stored, (start, size) in zip(*members(path), strict=True):
                name = listing.clean(stored)
                omitted[listing.SAME_NAME, ""] += stem + name in self._place
                self._place[stem + name] = number, start, size
                places[stem + name] = tops[number] + name
        images = rules.list_zip(self._place)
        omitted.update(images.omitted)
        for kind in (".cls", ".json") if self._labels else ():
            del omitted[kind, ""]
        self.listing = Listing(images.files, images.metadata, +omitted)
        self.places = [places[name] for name in self.listing.files]

    def open(self, path: str) -> IO[bytes]:
        shard, start, size = self._place[path]
        if size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        with open_regular(self._shards.paths[shard]) as file:
            return io.BytesIO(os.pread(file.fileno(), size, start))

    def digest(self, paths: list[str], content: bool) -> str:
        places = np.array([self._place[path] for path in paths], np.int64)
        return joined("\0".join(paths), places.tobytes(), self._shards.digest(content))

    @cached_property
    def _labels(self) -> dict[str, str]:
        """Names of the members with a label, by the key that they share with images."""
        names = (name for name in self._place if name.endswith((".cls", ".json")))
        return {_key(name): name for name in sorted(names, reverse=True)}  # a .cls counts first

    def classes(self) -> Classes | None:
        """The numbers or names in the .cls or .json files; None where no image has any."""
        files = {name: self._labels.get(_key(name)) for name in self.listing.files}
        if not any(files.values()):
            return None
        labels = [None if label is None else self._label(label) for label in files.values()]
        return numbered(labels) if any(label is not None for label in labels) else None

    def _label(self, name: str) -> int | str | None:
        with about(f"{self._shards.root}/{name}"), self.open(name) as file:
            content = read_bounded(file, MAX_LABEL)
            if name.endswith(".cls"):
                label = content.decode().strip()
                return int(label) if label.isdecimal() else label or None
            try:
                entries = json.loads(content)
            except RecursionError as error:
                raise ValueError("it is no JSON that is read here") from error
            if type(entries) is not dict:
                return None
            return next((entries[key] for key in LABELS if key in entries), None)

    def __getstate__(self) -> dict:
        """The places of the members alone, which are all that a worker process needs."""
        return {"_shards": self._shards, "_place": self._place}


def is_tar(start: bytes) -> bool:
    """True if a file that begins with `start`, unpacked, is a tar file."""
    return start[257:262] == b"ustar"


def _key(name: str) -> str:
    """The key that the files of an example share: a path up to the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def open_archive(file: IO[bytes]) -> tarfile.TarFile:
    """The tar file whose content is `file`; raises errors of `tarfile` where it is none."""
    return tarfile.open(fileobj=_Headers(file), mode="r:")


def in_order(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of `archive`; ValueError where one is damaged, other errors of `tarfile` too."""
    offset = 0
    while member := archive.next():
        archive.members = []  # else it would keep them all
        if member.size < 0 or archive.offset <= offset:  # else this would never end
            raise ValueError(f"its member at byte {member.offset:,} has a negative size")
        offset = archive.offset
        yield member


class _Headers:
    """A tar file of which no more than a header is read at once: sizes may be lies."""

    def __init__(self, file: IO[bytes]):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header takes {size:,} bytes")
        return self._file.read(size)


def members(path: Path) -> tuple[list[str], list[list[int]]]:
    """Names, and [start, size] in bytes, of the regular members of the tar at `path`.

    Those of a large file are cached by its size and times. Raises ValueError, which names the file,
    where it is damaged or cut off.
    """
    status = os.stat(path)
    written = max(status.st_mtime_ns, status.st_ctime_ns)
    if status.st_size < LARGE or time.time_ns() - written < FRESH:
        return _scan(path)

    def scan() -> dict[str, NDArray]:
        names, places = _scan(path)
        words = "\0".join(names).encode(errors="surrogateescape")
        rows = np.array(places, np.int64).reshape(-1, 2)
        return {"names": np.frombuffer(words, np.uint8), "places": rows}

    origin = {"size": status.st_size, "written": [status.st_mtime_ns, status.st_ctime_ns]}
    index = cached(cache_path(path, "tar-{}.npz"), origin, scan, spec=INDEX, optional=True)
    names = index["names"].tobytes().decode(errors="surrogateescape")
    return names.split("\0") if names else [], index["places"].tolist()


def _scan(path: Path) -> tuple[list[str], list[list[int]]]:
    names, places = [], []
    with refusing(path, "cannot be read as a tar file"), open_regular(path) as file:
        end = os.fstat(file.fileno()).st_size
        with open_archive(file) as archive:
            for member in in_order(archive):
                if member.isreg() and not member.issparse() and "\0" not in member.name:
                    names.append(member.name)
                    places.append([member.offset_data, member.size])
            file.seek(archive.offset)
            rest = file.read(tarfile.BLOCKSIZE)
            if archive.offset > end or rest.strip(b"\0"):
                raise ValueError(f"it is damaged at byte {archive.offset:,}")
    return names, places
