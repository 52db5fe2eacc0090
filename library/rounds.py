"""Work in rounds, each a cached file: a kill costs one round, and processes share them."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import distributed
from reports.progress import progress_bar
from storage.files import Spec, cached


def shared(desc: str, tasks: Sequence[tuple[int, Callable[[], dict]]]) -> list[dict]:
    """Results of all `tasks`, each with its number of images; [] in another than the main process.

    Each process does its share of them. They meet in the files of `cached`; where they cannot, the
    main process does again what it does not find.
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
    """Results of `compute(i, start)` for each of `starts`, in {files}_{i}.npz; see `shared`.

    Batch i is of `size` images, or as many as follow `start` in `total`. `spec(i, number)` tells
    what the file of a batch of `number` images has to hold (see `cached`).
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
    """Remove what an earlier evaluation with other numbers left, which would mix with this one."""
    for path in set(files) - set(wanted) if distributed.is_main() else ():
        path.unlink(missing_ok=True)
