"""Listing of a folder or zip: the image files that are data, and the files that are omitted.

Names are paths below the folder or zip, with '/' between folders and in Unicode's composed form
(NFC), so that they do not depend on the system that wrote them.
"""

import heapq
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from storage.workdir import TRAININGS_OWN, is_workdir, own_pictures

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif"),
    *(".webp", ".bmp", ".tif", ".tiff", ".gif"),
)
METADATA = "dataset.json"  # of EDM's dataset_tool.py: the class labels of images by their names
# Folders, in lower case, of thumbnails, deleted files and the files of a system.
SYSTEM_FOLDERS = {
    *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "__macosx"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found", "__pycache__"),
    *("network trash folder", "temporary items"),
}
MAX_KINDS, MAX_EXAMPLES = 12, 3  # of omitted files that a message names

# Kinds of omitted files.
SAME_NAME = "file{s} of a name that another has"
RUN, OF_RUN = "run{s} of this program", "folder{s} of a run of this program"

Omitted = Counter[tuple[str, str]]  # by (kind, example or ""); "{s}" in a kind is for its plural


class Listing(NamedTuple):
    """The image files of a folder or zip."""

    files: dict[str, str]  # {name: path as stored}, sorted by name
    metadata: tuple[str, str] | None  # name of a `dataset.json` and its path as stored
    omitted: Omitted  # other files and folders

    @classmethod
    def build(cls, images: dict[str, str], others: dict[str, str], omitted: Omitted) -> "Listing":
        """Choose the metadata among the `others`, and count the rest as omitted."""
        images = dict(sorted(images.items()))
        top = next(iter(images), "").partition("/")[0]  # of a zip that holds one folder
        name = next((n for n in (METADATA, f"{top}/{METADATA}") if n in others), None)
        for other in others:
            omitted[kind_of_file(other), ""] += other != name
        return cls(images, name and (name, others[name]), +omitted)


class Entries(NamedTuple):
    """Names of what lies in a folder."""

    folders: dict[str, bool]  # True for a link
    files: list[str]


def list_folder(root: Path) -> Listing:
    """The images below `root`; OSError where a folder cannot be read.

    Links to folders are followed. A folder that is reached more than once is read once: at its own
    place if that is below `root`, else by the first link.
    """
    omitted, visited = Omitted(), set()

    def read(below: str) -> Entries | None:
        path = os.path.join(root, below)
        status = os.stat(path)
        if (inode := (status.st_dev, status.st_ino)) in visited:
            omitted["further link{s} to a folder that is read", below[:-1]] += 1
            return None
        visited.add(inode)
        return _read_folder(path, omitted)

    return _listing(read, omitted)


def list_zip(names: Iterable[str]) -> Listing:
    """The images among the entries of a zip, by their names as they are stored."""
    omitted, stored = Omitted(), {}
    for entry in names:
        name = clean(entry)
        if name and not entry.endswith(("/", "\\")):  # an entry of a folder ends so
            omitted[SAME_NAME, ""] += name in stored
            stored[name] = entry  # the last one counts, as for programs that extract them
    return _listing(_tree(stored).get, omitted, stored)


def clean(name: str) -> str:
    """The path in NFC with '/' as separator, without empty or "." parts."""
    name = name if name.isascii() else unicodedata.normalize("NFC", name)
    parts = name.replace("\\", "/").split("/")
    cleaned = "/".join(part for part in parts if part not in ("", "."))
    return name if name == cleaned else cleaned  # one string in memory, not two


def is_image(name: str) -> bool:
    """True if the suffix of a file name is that of an image."""
    return name.lower().endswith(SUFFIXES)


def in_words(omitted: Omitted) -> str:
    """Text such as "30 .txt, 2 hidden folders (.git, .trash)"; "" if nothing is omitted."""
    numbers, examples = Counter(), {}
    for (kind, example), number in omitted.items():
        numbers[kind] += number
        examples.setdefault(kind, set()).update([_printable(example)] if example else [])
    kinds, words = sorted(numbers, key=lambda kind: (-numbers[kind], kind)), []
    for kind in kinds[:MAX_KINDS]:
        number, names = numbers[kind], sorted(examples[kind])
        more = ["..."] if len(names) > MAX_EXAMPLES else []
        named = f" ({', '.join(names[:MAX_EXAMPLES] + more)})" if names else ""
        words.append(f"{number:,} {kind.replace('{s}', 's' if number > 1 else '')}{named}")
    if others := sum(numbers[kind] for kind in kinds[MAX_KINDS:]):
        words.append(f"{others:,} of other kinds")
    return ", ".join(words)


def beside_splits(kind: str, parts: Iterable[str], split_names: Mapping[str, str]) -> Omitted:
    """Images or arrays, by the name of their folder or array in `parts`, that are in no split."""
    if not split_names:
        return Omitted()
    kind = f"{kind}{{s}} beside {' and '.join(split_names.values())}"
    used = {name.lower() for name in split_names.values()}
    return Omitted((kind, part) for part in parts if part.lower() not in used)


def kind_of_file(path: str) -> str:
    """The kind, for `Omitted`, of a file that is no image."""
    name = path.rpartition("/")[2]
    if name.startswith("."):
        return "hidden file{s}"
    suffix = re.search(r"\.\w{1,12}\Z", name.lower())
    return suffix[0] if suffix else "file{s} without a suffix"


# --- parts ----------------------------------------------------------------------------------------


def _listing(
    read: Callable[[str], Entries | None], omitted: Omitted, stored: Mapping[str, str] = {}
) -> Listing:
    """The images below the folder "", of which `read` gives each folder's entries.

    `stored` gives the stored path of a name that differs from it.
    """
    images, others = {}, {}
    for below, files in _walk(read, omitted):
        pictures = own_pictures(files)
        for name in sorted(files):
            path = clean(below + name)
            if name in pictures:
                omitted["picture{s} of this program", name] += 1
            elif path in images or path in others:
                omitted[SAME_NAME, ""] += 1
            else:
                is_data = is_image(name) and not name.startswith(".")
                (images if is_data else others)[path] = stored.get(path, below + name)
    return Listing.build(images, others, omitted)


def _walk(
    read: Callable[[str], Entries | None], omitted: Omitted
) -> Iterator[tuple[str, list[str]]]:
    """Folders that may hold data, "" or "a/b/", and the names of the files in each.

    Folders that are reached by a link wait until all others are read.
    """
    queue = [(False, "")]
    while queue:
        _, below = heapq.heappop(queue)
        entries = read(below)
        if entries is None:
            continue
        in_run = is_workdir(*entries)
        if in_run and below:
            omitted[RUN, below[:-1]] += 1
            continue
        for name, is_link in entries.folders.items():
            if kind := _kind_of_folder(name) or (in_run and name in TRAININGS_OWN and OF_RUN):
                omitted[kind, name] += 1
            else:
                heapq.heappush(queue, (is_link, f"{below}{name}/"))
        yield below, entries.files


def _read_folder(path: str, omitted: Omitted) -> Entries:
    folders, files = {}, []
    with os.scandir(path) as entries:
        for entry in entries:
            if (kind := _kind_of_entry(entry)) == "folder":
                folders[entry.name] = entry.is_symlink()
            elif kind == "file":
                files.append(entry.name)
            else:
                omitted[kind, ""] += 1
    return Entries(folders, files)


def _tree(paths: Iterable[str]) -> dict[str, Entries]:
    """The entries of each folder, "" or "a/b/", of these paths of files."""
    tree = {"": Entries({}, [])}
    for path in paths:
        folder, slash, file = path.rpartition("/")
        if folder + slash not in tree:
            below = ""
            for name in folder.split("/"):
                tree[below].folders[name] = False
                below += f"{name}/"
                tree.setdefault(below, Entries({}, []))
        tree[folder + slash].files.append(file)
    return tree


def _kind_of_entry(entry: os.DirEntry) -> str:
    """Either "folder", "file", or a kind for `Omitted`."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except OSError:  # a link to itself, too
        if entry.is_symlink():
            return "broken link{s}"
        raise
    return "pipe{s} or device{s}"


def _kind_of_folder(name: str) -> str | None:
    """The kind, for `Omitted`, of a folder that holds no data; None where it may."""
    if name.startswith(".") and name != "..":
        return "hidden folder{s}"
    return "folder{s} of the system" if name.lower() in SYSTEM_FOLDERS else None


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)[:60]
