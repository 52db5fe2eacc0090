"""Several files that together hold one data set, such as name-000000.tar to name-000099.tar."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sources import digests
from sources.labels import natural

MOST = 100_000  # shards
_RANGE = re.compile(r"\{(\d{1,15})\.\.(\d{1,15})\}")
_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?\Z")  # of a shard, at the end of its name


@dataclass(frozen=True)
class Shards:
    """The files `names` below `root`, in order."""

    root: Path
    names: tuple[str, ...]

    @classmethod
    def of_file(cls, path: Path) -> "Shards":
        return cls(path.parent, (path.name,))

    @classmethod
    def below(cls, root: Path, suffix: str) -> "Shards":
        """The files below the folder `root` with this suffix, in no hidden folder."""
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(folder).relative_to(root)
            names += [
                (below / name).as_posix()
                for name in files
                if name.lower().endswith(suffix) and not name.startswith(".")
            ]
        return cls(root, tuple(sorted(names, key=natural)))

    @classmethod
    def of_pattern(cls, pattern: str) -> "Shards | None":
        """The files that `pattern`, such as "a-{000..009}.tar", names; None if it has no range.

        Raises FileNotFoundError for the first that does not exist, and ValueError for a range that
        runs backwards, or too many files.
        """
        if not _RANGE.search(pattern):
            return None
        names = [pattern]
        while match := _RANGE.search(names[0]):
            first, last = map(int, match.groups())
            if not 0 <= last - first < MOST // len(names):
                raise ValueError(f"{pattern}: {match[0]} is no range, or one of too many files")
            width = len(match[1])
            names = [
                _RANGE.sub(f"{number:0{width}d}", name, count=1)
                for name in names
                for number in range(first, last + 1)
            ]
        for name in names:
            if not os.path.isfile(name):
                raise FileNotFoundError(f"{pattern}: {name} does not exist")
        root = os.path.commonpath([os.path.dirname(name) for name in names]) or "."
        return cls(Path(root), tuple(os.path.relpath(name, root) for name in names))

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]

    @cached_property
    def stems(self) -> list[str]:
        """The beginning of the names of each shard's images: its own name; "" of a single one."""
        if len(self.names) == 1:
            return [""]
        return [f"{name.rpartition('.')[0]}/" for name in self.names]

    def tops(self, find_splits: Callable[[Sequence[str]], dict[str, str]]) -> list[str]:
        """The folder in whose place each shard stands: that of its split, "train/", else "".

        Splits are found by the names without numbers and their common beginning, such as "train"
        and "val" of imagenet-train-000.tar and imagenet-val-000.tar.
        """
        words = [_NUMBER.sub("", name.rpartition(".")[0]) for name in self.names]
        start = os.path.commonprefix([*set(words)]) if len(set(words)) > 1 else ""
        start = re.match(r"(.*[^a-zA-Z])?", start)[0]  # ends between words
        words = [word.removeprefix(start).partition("/")[0] for word in words]
        return [f"{word}/" for word in words] if find_splits(words) else [""] * len(words)

    def digest(self, content: bool) -> str:
        """The digest of names, sizes and CRC-32 of the shards; see `digests.of_files`."""
        return digests.of_files(
            self.root, [*self.names], content, 4 * len(self.names), largest=None
        )
