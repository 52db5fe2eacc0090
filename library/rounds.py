"""Work in rounds, each a cached file: a kill costs one round, and processes share them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import distributed
from reports.progress import progress_bar
from storage.files import cached


@dataclass(frozen=True)
class Rounds:
    """Rounds of at most `size` of `total` images, `passes` times over.

    Attributes:
        name: of the work, for the progress bar.
    """

    name: str
    total: int
    size: int
    passes: int = 1

    @property
    def parts(self) -> list[slice]:
        """The images of each round."""
        starts = range(0, self.total, self.size)
        return self.passes * [slice(i, min(i + self.size, self.total)) for i in starts]

    def results(self, work: Callable[[int, slice], dict]) -> list[dict]:
        """Results of `work(number of the round, its images)`, in the main process; [] in others.

        Each process does its share of the rounds. The main one then reads the results of the others
        from the files that `work` caches; where these are not on a common disk, it repeats it.
        """
        rounds = [*enumerate(self.parts)]
        share, results = rounds[distributed.rank() :: distributed.world()], []
        images = sum(part.stop - part.start for _, part in share)
        with progress_bar(total=images, desc=self.name, unit="image") as progress:
            for i, part in share:
                results.append(work(i, part))
                progress.update(part.stop - part.start)
        if distributed.world() == 1:
            return results
        distributed.barrier()
        return [work(i, part) for i, part in rounds] if distributed.is_main() else []

    def cached(
        self,
        files: Path,
        origin: dict,
        names: Collection[str],
        work: Callable[[int, slice], dict],
    ) -> list[dict]:
        """The `results` of work that is cached in {files}_{i}.npz, of round i.

        Args:
            files: path of the files without "_{i}.npz".
            origin: everything that the results depend on; see `cached`.
            names: of the arrays that each file has.
            work: see `results`.
        """

        def path(i: int) -> Path:
            return files.with_name(f"{files.name}_{i}.npz")

        def work_once(i: int, part: slice) -> dict:
            key = origin | {"batch": (i, self.size)}
            return cached(path(i), key, lambda: work(i, part), names)

        remove_others(files.parent, f"{files.name}_*.npz", [*map(path, range(len(self.parts)))])
        return self.results(work_once)


def remove_others(folder: Path, pattern: str, files: list[Path]) -> None:
    """Remove all files but `files`: those of an earlier evaluation with other numbers."""
    for path in set(folder.glob(pattern)) - set(files) if distributed.is_main() else ():
        path.unlink(missing_ok=True)
