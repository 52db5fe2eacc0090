"""A watch over the processes of a job: where none of them goes on, it ends, and says which hangs.

Each process tells the others through the store what it did last, a few times within the limit, from
a thread of its own. A process that is stopped, or whose machine is gone, falls silent. In one that
waits for ever (a disk, a lock, a collective) the thread goes on, and its last action gets old. All
the others wait for it, so that soon nobody goes on; the time is counted from there. Long work of
one process, for which the others wait, is no alarm as long as it calls `did`.
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
LOOKS = 20  # within the limit, at least
LONGEST_INTERVAL = 5.0  # seconds between looks

_done = ("its start", 0)  # the last action, and the number of those before


def did(action: str) -> None:
    """Note that this process goes on: it has just done the `action`, such as "step 17"."""
    global _done
    _done = action, _done[1] + 1


class Sign(NamedTuple):
    """A sign of life of a process.

    Attributes:
        number: of signs that it gave before.
        action: what it did last.
        actions: number of those before.
        place: file, line and function of the program where it is.
    """

    number: int
    action: str
    actions: int
    place: str


@contextlib.contextmanager
def watched(store: dist.Store, rank: int, world: int, limit: float) -> Iterator[None]:
    """Within the `with` block a process that hangs ends the job after at most `limit` seconds.

    Args:
        store: a connection of its own to the store of the group.
        rank: number of this process.
        world: number of processes.
        limit: seconds without a call of `did` in any process.
    """
    watch = Watch(store, rank, world, limit)
    threads = [threading.Thread(target=f, daemon=True) for f in (watch.exchange, watch.look)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        threads[1].join()  # the other may wait for a store that is no more


class Watch:
    """One process's view of all; see the module. `look` never waits for the store, which may hang.

    Seconds are counted in looks, so that the time in which all processes are suspended is none.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, limit: float):
        self.store, self.rank, self.limit = store, rank, limit
        self.interval = min(limit / LOOKS, LONGEST_INTERVAL)
        self.ended = threading.Event()
        self.signs = [Sign(-1, *_done, "")] * world
        self.silent_for, self.idle_for = [0.0] * world, [0.0] * world  # seconds, by rank

    def exchange(self) -> None:
        """Give signs of life, and read those of the others, until the store is no more."""
        names = [f"sign/{rank}" for rank in range(len(self.signs))]
        number = 0
        with contextlib.suppress(RuntimeError):  # the store's; the silence is then seen
            while not self.ended.wait(self.interval):
                sign = Sign(number, *_done, _place())
                self.store.set(names[self.rank], json.dumps(sign))
                self.signs = [Sign(*json.loads(text)) for text in self.store.multi_get(names)]
                number += 1

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
            if idle_for > self.limit - 4 * self.interval:  # signs take up to two looks
                self._end()

    def _end(self) -> None:
        """End the process; the lowest rank that gives signs of life says which one hangs."""
        self.ended.set()  # nobody asks a store that is about to end
        half, ranks = self.limit / 2, range(len(self.signs))
        silent = [rank for rank in ranks if self.silent_for[rank] > half]
        if self.rank in silent:  # the store does not answer, which is rank 0's but with torchrun
            silent = [0]
        rank = silent[0] if silent else max(ranks, key=self._suspicion)
        if self.rank == min({*ranks} - {*silent}):
            life = f"no sign of life for {half:g} s" if silent else "signs of life"
            hanging, other = self.signs[rank], 0 if rank else 1
            print(
                f"\nerror: rank {rank} hangs: nobody has gone on for training.hang_seconds="
                f"{self.limit:g}; it gives {life}; the last thing it did: {hanging.action}, then "
                f"it was at {hanging.place}; rank {other} is at {self.signs[other].place}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(3 * self.interval)  # until all have noticed: launchers stop the rest then
        os._exit(HANGS)

    def _suspicion(self, rank: int) -> tuple[bool, int, float]:
        """Who is not waiting for the others; else is where few are; else stopped first."""
        places = [sign.place for sign in self.signs]
        waits = places[rank].startswith("distributed.py")
        return not waits, -places.count(places[rank]), self.idle_for[rank]


def _place() -> str:
    """Where the main thread is in the program: file, line and function."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PROGRAM) and "site-packages" not in path.parts:
            return f"{path.relative_to(PROGRAM)}:{frame.f_lineno}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "no file of the program"
