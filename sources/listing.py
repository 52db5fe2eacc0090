"""Listing of a folder or zip: the image files that are data, and the files left out.

Names are paths below the folder or zip, with '/' between folders and in Unicode's composed form
(NFC), so that they do not depend on the system that wrote them.
"""

import heapq
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
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
MAX_KINDS, MAX_EXAMPLES = 12, 3  # of left-out files that a message names

# Kinds of left-out files.
SAME_NAME = "file{s} of a name that another has"
RUN, OF_RUN = "run{s} of this program", "folder{s} of a run of this program"

LeftOut = Counter[tuple[str, str]]  # by (kind, example or ""); "{s}" in a kind is for its plural


class Listed(NamedTuple):
    """The image files of a folder or zip.

    `files` are {name: path as stored}, sorted by name. `metadata` is the name of a `dataset.json`
    and its path as stored, if there is one.
    """

    files: dict[str, str]
    metadata: tuple[str, str] | None
    left_out: LeftOut

    @classmethod
    def build(cls, images: dict[str, str], others: dict[str, str], left_out: LeftOut) -> "Listed":
        """Choose the metadata among the `others`, and count the rest as left out."""
        images = dict(sorted(images.items()))
        top = next(iter(images), "").partition("/")[0]  # of a zip that holds one folder
        name = next((n for n in (METADATA, f"{top}/{METADATA}") if n in others), None)
        for other in others:
            left_out[kind_of_file(other), ""] += other != name
        return cls(images, name and (name, others[name]), +left_out)


def list_folder(root: Path) -> Listed:
    """The images below `root`; OSError where a folder cannot be read.

    Links to folders are followed. A folder that is reached more than once is read once: at its own
    place if that is below `root`, else by the first link.
    """
    left_out = LeftOut()
    return _listed(_walk(root, left_out), left_out, {})


def list_names(names: Iterable[str]) -> Listed:
    """The images among the entries of a zip, by their names as they are stored."""
    left_out, stored = LeftOut(), {}
    for entry in names:
        name = clean(entry)
        if name and not entry.endswith(("/", "\\")):  # an entry of a folder ends so
            left_out[SAME_NAME, ""] += name in stored
            stored[name] = entry  # the last one counts, as for programs that extract them
    return _listed(_grouped(stored, left_out), left_out, stored)


def clean(name: str) -> str:
    """The path in NFC with '/' as separator, without empty or "." parts."""
    name = name if name.isascii() else unicodedata.normalize("NFC", name)
    parts = name.replace("\\", "/").split("/")
    cleaned = "/".join(part for part in parts if part not in ("", "."))
    return name if name == cleaned else cleaned  # one string in memory, not two


def is_image(name: str) -> bool:
    """True if the suffix of a file name is that of an image."""
    return name.lower().endswith(SUFFIXES)


def in_words(left_out: LeftOut) -> str:
    """Text such as "30 .txt, 2 hidden folders (.git, .trash)"; "" if nothing is left out."""
    numbers, examples = Counter(), {}
    for (kind, example), number in left_out.items():
        numbers[kind] += number
        examples.setdefault(kind, []).extend([_printable(example)] * bool(example))
    kinds, words = sorted(numbers, key=lambda kind: (-numbers[kind], kind)), []
    for kind in kinds[:MAX_KINDS]:
        number, names = numbers[kind], sorted(set(examples[kind]))
        named = names[:MAX_EXAMPLES] + ["..."] * (len(names) > MAX_EXAMPLES)
        kind = kind.replace("{s}", "s" * (number > 1))
        words.append(f"{number:,} {kind}" + f" ({', '.join(named)})" * bool(names))
    if others := sum(numbers[kind] for kind in kinds[MAX_KINDS:]):
        words.append(f"{others:,} of other kinds")
    return ", ".join(words)


def kind_of_file(path: str) -> str:
    """The kind, for `LeftOut`, of a file that is no image."""
    name = path.rpartition("/")[2]
    if name.startswith("."):
        return "hidden file{s}"
    suffix = re.search(r"\.\w{1,12}\Z", name.lower())
    return suffix[0] if suffix else "file{s} without a suffix"


# --- parts ----------------------------------------------------------------------------------------


def _walk(root: Path, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Folders that may hold data, "" or "a/b/", and the names of the files in each.

    Folders that are reached by a link wait until all others are read.
    """
    seen, queue = set(), [(False, "")]
    while queue:
        _, below = heapq.heappop(queue)
        path = os.path.join(root, below)
        status = os.stat(path)
        if (identity := (status.st_dev, status.st_ino)) in seen:
            left_out["further link{s} to a folder that is read", below[:-1]] += 1
            continue
        seen.add(identity)
        folders, files = {}, []
        with os.scandir(path) as entries:
            for entry in entries:
                if (kind := _kind_of_entry(entry)) == "folder":
                    folders[entry.name] = entry.is_symlink()
                elif kind == "file":
                    files.append(entry.name)
                else:
                    left_out[kind, ""] += 1
        in_run = is_workdir(folders, files)
        if in_run and below:
            left_out[RUN, below[:-1]] += 1
            continue
        for name, is_link in folders.items():
            if kind := _kind_of_folder(name) or (in_run and name in TRAININGS_OWN and OF_RUN):
                left_out[kind, name] += 1
            else:
                heapq.heappush(queue, (is_link, f"{below}{name}/"))
        yield below, files


def _grouped(names: Iterable[str], left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """The folders of these files that may hold data, and the names of the files; see `_walk`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        folder, slash, last = name.rpartition("/")
        groups.setdefault(folder + slash, []).append(last)
    inside: dict[str, set[str]] = {}  # the folders of those that hold a config.json
    for folder in groups:
        above, slash, last = folder[:-1].rpartition("/")
        if "config.json" in groups.get(above + slash, ()):
            inside.setdefault(above + slash, set()).add(last)
    runs = {folder for folder, folders in inside.items() if is_workdir(folders, groups[folder])}
    lengths = {len(run) for run in runs} - {0}
    skipped = set()
    for folder, files in groups.items():
        top, parts = folder.partition("/")[0], folder.split("/")[:-1]
        bad = next((i for i, part in enumerate(parts) if _kind_of_folder(part)), None)
        if run := next((folder[:n] for n in lengths if folder[:n] in runs), None):
            skipped.add((RUN, run[:-1], run))
        elif bad is not None:
            skipped.add((_kind_of_folder(parts[bad]), parts[bad], tuple(parts[: bad + 1])))
        elif "" in runs and top in TRAININGS_OWN:
            skipped.add((OF_RUN, top, top))
        else:
            yield folder, files
    left_out.update((kind, example) for kind, example, _ in skipped)


def _kind_of_entry(entry: os.DirEntry) -> str:
    """Either "folder", "file", or a kind for `LeftOut`."""
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
    """The kind, for `LeftOut`, of a folder that holds no data; None where it may."""
    if name.startswith(".") and name != "..":
        return "hidden folder{s}"
    return "folder{s} of the system" if name.lower() in SYSTEM_FOLDERS else None


def _listed(
    groups: Iterable[tuple[str, list[str]]], left_out: LeftOut, stored: dict[str, str]
) -> Listed:
    """The images among the files of folders; `stored` gives the stored path by name."""
    images, others = {}, {}
    for below, files in groups:
        pictures = own_pictures(files)
        for name in sorted(files):
            path = clean(below + name)
            if name in pictures:
                left_out["picture{s} of this program", name] += 1
            elif path in images or path in others:
                left_out[SAME_NAME, ""] += 1
            else:
                kind = images if is_image(name) and not name.startswith(".") else others
                kind[path] = stored.get(path, below + name)
    return Listed.build(images, others, left_out)


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)[:60]
