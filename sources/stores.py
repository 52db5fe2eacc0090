"""Where image files lie: in a folder or a zip. Tars and parquet have modules of their own."""

import zipfile
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from sources import digests, listing
from sources.base import Classes, PerProcess
from sources.files import open_below, open_in
from sources.listing import Listing
from sources.rules import Rules
from storage.files import one_line


class Store(Protocol):
    """Image files by their stored paths; it can be pickled for the processes that read them.

    Attributes:
        listing: which of them are data, and what is omitted.
        places: paths of the files of `listing`, by which splits and classes are found; their names
            may be longer, to tell them apart.
    """

    listing: Listing
    places: list[str]

    def open(self, path: str) -> IO[bytes]: ...

    def digest(self, paths: list[str], content: bool) -> str:
        """The digest of the files `paths`; without `content` it may be that of names and sizes."""
        ...

    def classes(self) -> Classes | None:
        """Class labels of the files of `listing` that the store has itself, -1 for none."""
        return None


class InFolder(Store):
    """The files of the folder at `root`."""

    def __init__(self, root: Path, rules: Rules):
        self.root, self.listing = root, rules.list_folder(root)
        self.places = [*self.listing.files]
        self.open = partial(open_below, root)

    def digest(self, paths: list[str], content: bool) -> str:
        return digests.of_files(self.root, paths, content, 4 * len(self.listing.files))


class InZip(Store):
    """The entries of the zip file at `path`, the value of `key`; ValueError where it is none."""

    def __init__(self, path: Path, rules: Rules, key: str):
        self._archive = archive = PerProcess(partial(zipfile.ZipFile, path))
        try:
            names = archive().namelist()
        except Exception as error:  # a damaged directory makes it fail in any way
            says = (
                f"no folder, .npy, .npz or zip file, nor another of docs/data.md: {one_line(error)}"
            )
            if listing.is_image(path.name):
                says = f"one image: name the folder with all of them, such as {path.parent}"
            raise ValueError(f"{key}={path} is {says}") from error
        self.listing, self.open = rules.list_zip(names), partial(open_in, archive)
        self.places = [*self.listing.files]

    def digest(self, paths: list[str], content: bool) -> str:
        return digests.of_entries(self._archive(), paths)
