"""The checkpoints of a run: which to go on from, which to evaluate, which to delete."""

import contextlib
import logging
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from configs.keys import shown
from storage.checkpoints import (
    SNAPSHOTS,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
    snapshot_number,
)
from storage.shared_files import SHARED
from storage.workdir import best_path, checkpoint_path, refuse_links, resume_paths

log = logging.getLogger(__name__)


def numbered_checkpoints(workdir: Path) -> dict[int, Path]:
    """{step: path} of the numbered checkpoints, in ascending order."""
    names = re.compile(r"checkpoint_(\d+)\.pth")
    paths = (workdir / "checkpoints").glob("checkpoint_*.pth")
    return dict(sorted((int(m[1]), p) for p in paths if (m := names.fullmatch(p.name))))


def states(workdir: Path) -> list[Path]:
    """Paths of a run's states, the newest first: those to go on from, then the numbered ones.

    The first two need not exist.
    """
    return [*resume_paths(workdir), *reversed(numbered_checkpoints(workdir).values())]


def snapshots(workdir: Path) -> dict[int, Path]:
    """{k: path} of the snapshots and shared files in checkpoints/, in ascending order.

    Number k is that of network-snapshot-{k}.pkl or training-state-{k}.pt, which counts thousands of
    images; 0 for other names.

    Raises:
        ValueError: two have the same number.
    """
    paths: dict[int, Path] = {}
    for path in sorted((workdir / "checkpoints").glob("*")):
        if path.suffix in SNAPSHOTS:
            number = snapshot_number(path)
            if number in paths:
                raise ValueError(
                    f"{paths[number]} and {path.name} are both number {number}: leave one, "
                    "or number them as in network-snapshot-1.pkl"
                )
            paths[number] = path
    return dict(sorted(paths.items()))


def passed_over(workdir: Path) -> list[str]:
    """A line on files of weights in `workdir` from which training does not go on, if any."""
    paths = [*workdir.glob("*"), *(workdir / "checkpoints").glob("*")]
    names = sorted(str(p.relative_to(workdir)) for p in paths if p.suffix in SNAPSHOTS)
    start = "training starts at step 0 with new weights; it does not go on from"
    return [f"{start} {', '.join(names)}"] if names else []


# --- to go on from -------------------------------------------------------------------------------


def save_state(workdir: Path, state: dict, numbered: bool = False, keep: int = 0) -> None:
    """Save `state` for resuming, keeping the previous one; first, if `numbered`, for evaluation.

    Args:
        workdir: of the run.
        state: content of the checkpoint.
        numbered: whether it is also a numbered checkpoint, which the list `written` in it names.
        keep: number of numbered checkpoints that are kept; see `drop_checkpoints`.

    Raises OSError where a file cannot be written.
    """
    if numbered:
        save_checkpoint(checkpoint_path(workdir, state["step"]), state)
        drop_checkpoints(workdir, state["written"], keep)
    newest, previous = resume_paths(workdir)
    save_checkpoint(newest, state, previous)


def newest_checkpoint(
    workdir: Path, set_aside: bool = True, read: Callable[[Path], dict] = load_checkpoint
) -> tuple[Path, dict] | None:
    """Path and content of the newest state that `read` accepts; None where there is none at all.

    A warning names a damaged file, and the one before it is tried; the numbered ones come last. A
    damaged newest state is `set_aside`, so that it does not replace the one before it.

    Raises:
        ValueError: there are states, but all of them are damaged.
    """
    newest, *others = states(workdir)
    damaged = []
    for path in (newest, *others):
        try:
            state = read(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            log.warning(f"{error}; looking for the checkpoint before it")
            damaged.append(path)
            continue
        if set_aside and newest in damaged:
            with contextlib.suppress(FileNotFoundError):  # another process of the run has done it
                os.replace(newest, newest.with_name(f"{newest.name}.damaged"))
        return path, state
    if damaged:
        raise ValueError(
            f"no intact checkpoint to go on from: {', '.join(map(str, damaged))} damaged; "
            "name another workdir to start anew"
        )
    return None


def find_checkpoint(path: Path) -> tuple[Path, dict]:
    """Path and content of the checkpoint at `path`, a file or a workdir; see `open_checkpoint`.

    In a workdir it is the newest intact one, else the last of the `snapshots`; no file is changed.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged, or not a checkpoint of this program; or see `refuse_links`.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint and no workdir: {path} does not exist")
        return path, open_checkpoint(path, intact=True)
    refuse_links(path)
    read = partial(open_checkpoint, intact=True)
    if newest := newest_checkpoint(path, set_aside=False, read=read):
        return newest
    if published := list(snapshots(path).values()):
        return published[-1], read(published[-1])
    raise FileNotFoundError(f"no checkpoint in {path}: neither checkpoints-meta/ nor checkpoints/")


def peek(workdir: Path) -> tuple[Path, dict] | None:
    """Path and content of the newest checkpoint that can be read, without the tensors' memory.

    None where there is none. Damaged ones are skipped without a warning, which loading gives.
    """
    for path in states(workdir):
        try:
            return path, open_checkpoint(path)
        except (OSError, ValueError):
            continue
    shared = [path for path in snapshots(workdir).values() if path.suffix == SHARED]
    if shared and not numbered_checkpoints(workdir):
        return shared[-1], open_checkpoint(shared[-1])
    return None


# --- written by a run ----------------------------------------------------------------------------


def written_steps(checkpoint: dict, path: Path) -> list[int]:
    """The steps of the numbered checkpoints that the run of `checkpoint`, from `path`, has written.

    Raises:
        ValueError: the checkpoint holds something else.
    """
    steps = checkpoint.get("written", [])
    last = checkpoint["step"]
    if type(steps) is not list or not all(type(s) is int and 0 <= s <= last for s in steps):
        raise ValueError(f"{path}: `written` holds no steps up to {last}: {shown(steps)}")
    return steps


def drop_checkpoints(workdir: Path, written: list[int], keep: int) -> None:
    """Delete the oldest of the run's own numbered checkpoints, to leave `keep` (0: all).

    Args:
        workdir: of the run.
        written: their steps, in the order of writing; files of other steps are not touched.
        keep: number of checkpoints.
    """
    for step in written[:-keep] if keep else []:
        path = checkpoint_path(workdir, step)
        for file in (path, *path.parent.glob(f"{path.stem}.fitted*.npz")):
            file.unlink(missing_ok=True)


def fitted_path(checkpoint: Path, n: int = 0) -> Path:
    """Path, beside a checkpoint, of its measured errors or, for `n` > 0, of n fitted steps."""
    return checkpoint.with_suffix(f".fitted-{n}.npz" if n else ".fitted.npz")


def levels_path(checkpoint: Path, n: int) -> Path:
    """Path, beside a checkpoint, of the noise levels chosen for n evaluations."""
    return checkpoint.with_suffix(f".fitted-levels-{n}.npz")


# --- to evaluate ---------------------------------------------------------------------------------


def checkpoints_of_steps(workdir: Path, steps: str, freq: int) -> dict[int, Path]:
    """{k: path} of the numbered checkpoints of `steps`, "1000,2000", of the "last" or the "best".

    Number k is the step in units of `freq`, rounded up. A workdir that has `snapshots` only gives
    the last of them, or those of the numbers `steps`.

    Raises:
        FileNotFoundError: one of them does not exist.
        ValueError: two steps have the same number k, or the best checkpoint is damaged.
    """
    if steps == "best":
        path = best_path(workdir)
        if not path.exists():
            raise FileNotFoundError(
                f"eval.steps=best: there is no {path}, which training.metric_freq makes"
            )
        return {math.ceil(open_checkpoint(path)["step"] / freq): path}
    paths, divisor = numbered_checkpoints(workdir), freq
    if not paths:
        paths, divisor = snapshots(workdir), 1
    folder, chosen = workdir / "checkpoints", {}
    if not paths:
        raise FileNotFoundError(f"no checkpoint to evaluate: {folder} has none")
    for step in [max(paths)] if steps == "last" else map(int, steps.split(",")):
        k = math.ceil(step / divisor)
        if step not in paths:
            names = ", ".join(map(str, paths))
            raise FileNotFoundError(f"eval.steps={steps}: {folder} has no step {step}, but {names}")
        if k in chosen and chosen[k] != paths[step]:
            raise ValueError(
                f"eval.steps={steps}: {chosen[k].name} and {paths[step].name} are both number {k}, "
                f"by training.snapshot_freq={freq}: evaluate each in a folder of its own"
            )
        chosen[k] = paths[step]
    return chosen


def checkpoints_to_evaluate(
    workdir: Path, first: int, end: int, freq: int, n_iters: int
) -> dict[int, Path]:
    """{k: path} of the checkpoints number `first` to `end` that exist.

    Number k is that of step k * `freq`, and the last number of a run is that of step `n_iters`,
    even if `freq` does not divide it. Some published programs name files by k itself; such a file
    is used where its step agrees. A number beyond the last one whose file does not exist means the
    last one. A workdir that has `snapshots` only gives all of them.

    Raises:
        FileNotFoundError: none of them exists.
        ValueError: the first number is larger than the last, or two snapshots have the same.
    """
    if first > end:
        raise ValueError(f"eval.begin_ckpt={first} lies after eval.end_ckpt={end}")
    published = snapshots(workdir)
    if published and not numbered_checkpoints(workdir):
        return published
    last = math.ceil(n_iters / freq)

    def step_of(k: int) -> int:
        return n_iters if k == last else k * freq

    def find(k: int) -> Path | None:
        path, by_number = checkpoint_path(workdir, step_of(k)), checkpoint_path(workdir, k)
        if path.exists():
            return path
        try:
            step = open_checkpoint(by_number)["step"]
        except FileNotFoundError:
            return None
        return by_number if step == step_of(k) or step // freq == k else None

    candidates = {k: find(k) for k in range(first, end + 1)}
    if beyond := [k for k, path in candidates.items() if k > last and path is None]:
        log.info(
            f"eval.begin_ckpt={first} to eval.end_ckpt={end}: the last checkpoint of "
            f"training.n_iters={n_iters} steps is number {last}"
        )
        for k in beyond:
            del candidates[k]
        candidates[last] = find(last)
    paths = {k: path for k, path in sorted(candidates.items()) if path is not None}
    folder = workdir / "checkpoints"
    others = {*folder.glob("checkpoint_*.pth"), *published.values()} - {*paths.values()}
    other_names = ", ".join(sorted(path.name for path in others))
    if not paths:
        first, end = min(first, last), min(end, last)
        raise FileNotFoundError(
            f"no checkpoint to evaluate: looked in {folder} for checkpoint_{step_of(first)}.pth to "
            f"checkpoint_{step_of(end)}.pth (eval.begin_ckpt and eval.end_ckpt count "
            f"training.snapshot_freq={freq} steps); found {other_names or 'none'}"
        )
    for k in sorted(candidates.keys() - paths.keys()):
        log.warning(f"{checkpoint_path(workdir, step_of(k))} does not exist; passed over")
    if others:
        log.info(f"not asked for in {folder}: {other_names}")
    return paths


def open_unless_removed(path: Path) -> dict | None:
    """The content of an intact checkpoint; None, and a warning, if it is gone since it was listed.

    A run that trains at the same time removes checkpoints (`training.keep_checkpoints`).
    """
    try:
        return open_checkpoint(path, intact=True)
    except FileNotFoundError:
        log.warning(f"{path} has been removed, as by training.keep_checkpoints; passed over")
        return None
