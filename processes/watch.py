"""A watch that ends a job in which no process makes progress, and says which process hangs.

A thread of each process tells the others through the store what the process did last, several times
within the limit. A process that is stopped, or whose machine is gone, falls silent. In a process
that waits for ever (for a disk, a lock, a collective) the thread goes on, but the last action gets
old. All the others wait for that process, so that soon none makes progress; the time is counted
from there. Long work of one process, for which the others wait, raises no alarm as long as that
process calls `did`.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

PROGRAM = Path(__file__).parent.parent
HANGS = os.EX_SOFTWARE  # exit status, 70
LOOKS = 20  # least number of looks within the limit
LONGEST_INTERVAL = 5.0  # seconds between looks

_done = ("its start", 0)  # the last action, and the number of actions before it


def did(action: str) -> None:
    """Note that this process makes progress: it has just done the `action`, such as "step 17"."""
    global _done
    _done = action, _done[1] + 1


class Sign(NamedTuple):
    """A sign of life of a process.

    Attributes:
        number: number of signs that the process gave before.
        action: what the process did last.
        actions: number of actions before that.
        place: file, line and function of the program that its main thread is in.
    """

    number: int
    action: str
    actions: int
    place: str


@contextlib.contextmanager
def watched(store: dist.Store, rank: int, world: int, limit: float) -> Iterator[None]:
    """End the job at most `limit` seconds after a process starts to hang within the `with` block.

    Args:
        store: a connection of its own to the store of the group.
        rank: number of this process.
        world: number of processes.
        limit: seconds without a call of `did` in any process.
    """
    watch = Watch(store, rank, world, limit)
    watch.give_sign(0)  # the others wait for it, and would never know who hangs without it
    threads = [threading.Thread(target=f, daemon=True) for f in (watch.exchange, watch.look)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        threads[1].join()  # the other thread may wait for a store that has ended


class Watch:
    """One process's view of all processes; see the docstring of the module.

    `look` never waits for the store, which may hang. Seconds are counted in looks, so that time in
    which all processes are suspended does not count.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, limit: float):
        self.store, self.rank, self.limit = store, rank, limit
        self.interval = min(limit / LOOKS, LONGEST_INTERVAL)
        self.ended = threading.Event()
        self.signs = [Sign(-1, *_done, "")] * world
        self.silent_for, self.idle_for = [0.0] * world, [0.0] * world  # seconds, by rank

    def exchange(self) -> None:
        """Give signs of life, and read those of the others, until the store ends."""
        names = [f"sign/{rank}" for rank in range(len(self.signs))]
        number = 1
        with contextlib.suppress(RuntimeError):  # of the store; `look` then sees the silence
            while not self.ended.wait(self.interval):
                self.give_sign(number)
                self.signs = [Sign(*json.loads(text)) for text in self.store.multi_get(names)]
                number += 1

    def give_sign(self, number: int) -> None:
        """Store this process's sign of life."""
        self.store.set(f"sign/{self.rank}", json.dumps(Sign(number, *_done, _place())))

    def look(self) -> None:
        """Count the seconds in which nothing changes; end the process at the limit."""
        before, idle_for, done = self.signs, 0.0, _done
        while not self.ended.wait(self.interval):
            signs, goes_on = self.signs, done != _done
            for rank, (last, sign) in enumerate(zip(before, signs, strict=True)):
                silent, idle = last.number == sign.number, last.actions == sign.actions
                self.silent_for[rank] = (self.silent_for[rank] + self.interval) * silent
                self.idle_for[rank] = (self.idle_for[rank] + self.interval) * idle
                goes_on |= not idle
            before, done = signs, _done
            idle_for = 0.0 if goes_on else idle_for + self.interval
            if idle_for > self.limit - 4 * self.interval:  # signs arrive up to two looks late
                self._end()

    def _end(self) -> None:
        """End this process; the lowest rank that gives signs of life prints which process hangs."""
        self.ended.set()  # no more calls of a store that is about to end
        half, ranks = self.limit / 2, range(len(self.signs))
        silent = [rank for rank in ranks if self.silent_for[rank] > half]
        if self.rank in silent:  # the store does not answer; except with torchrun, rank 0 serves it
            silent = [0]
        rank = silent[0] if silent else max(ranks, key=self._suspicion)
        if self.rank == min({*ranks} - {*silent}):
            life = f"no sign of life for {half:g} s" if silent else "signs of life"
            hanging, other = self.signs[rank], 0 if rank else 1
            print(
                f"\nerror: rank {rank} hangs: no process has made progress for "
                f"training.hang_seconds={self.limit:g}; rank {rank} gives {life}; the last thing "
                f"it did: {hanging.action}, then it was at {hanging.place}; "
                f"rank {other} is at {self.signs[other].place}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(3 * self.interval)  # until all have noticed, since launchers then stop the rest
        os._exit(HANGS)

    def _suspicion(self, rank: int) -> tuple[bool, int, float]:
        """Sort key: not waiting for others; then few at the same place; then longest idle."""
        places = [sign.place for sign in self.signs]
        waits = places[rank].startswith("distributed.py")
        return not waits, -places.count(places[rank]), self.idle_for[rank]


def _place() -> str:
    """File, line and function of the program that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PROGRAM) and "site-packages" not in path.parts:
            return f"{path.relative_to(PROGRAM)}:{frame.f_lineno}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "no file of the program"
