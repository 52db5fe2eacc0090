"""Work in rounds, each a cached file: a kill costs one round, and processes share them."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import distributed
from reports.progress import progress_bar
from storage.files import Spec, cached


def shared(desc: str, tasks: Sequence[tuple[int, Callable[[], dict]]]) -> list[dict]:
    """Results of all `tasks`, pairs (number of images, work), in the main process; [] in others.

    Each process does its share. The main process reads the results of others from the files of
    `cached`; where these are not on a common disk, it repeats the work.
    """
    mine = tasks[distributed.rank() :: distributed.world()]
    results = []
    with progress_bar(total=sum(n for n, _ in mine), desc=desc, unit="image") as progress:
        for images, task in mine:
            results.append(task())
            progress.update(images)
    if distributed.world() == 1:
        return results
    distributed.barrier()
    return [task() for _, task in tasks] if distributed.is_main() else []


def in_batches(
    desc: str,
    files: Path,
    starts: Sequence[int],
    size: int,
    total: int,
    origin: dict,
    compute: Callable[[int, int], dict],
    spec: Callable[[int, int], Spec],
) -> list[dict]:
    """Results of `compute(i, start)` for each of `starts`, cached in {files}_{i}.npz; see `shared`.

    Batch i has `size` images, or those that remain of `total` from `start` on. `spec(i, number)` is
    the spec of the file of a batch of `number` images (see `cached`).
    """
    paths = [files.with_name(f"{files.name}_{i}.npz") for i in range(len(starts))]
    remove_others(files.parent.glob(f"{files.name}_*.npz"), paths)
    tasks = []
    for i, (start, path) in enumerate(zip(starts, paths, strict=True)):
        number, key = min(size, total - start), origin | {"batch": (i, size)}
        task = partial(cached, path, key, partial(compute, i, start), spec(i, number))
        tasks.append((number, task))
    return shared(desc, tasks)


def remove_others(files: Iterable[Path], wanted: list[Path]) -> None:
    """Remove `files` that are not `wanted`: results of an earlier evaluation with other numbers."""
    for path in set(files) - set(wanted) if distributed.is_main() else ():
        path.unlink(missing_ok=True)
