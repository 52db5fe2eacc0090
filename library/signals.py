"""Signals that ask a program to stop after its step, with all saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

REPEATED = signal.SIGHUP, signal.SIGUSR1  # signals that may be sent several times


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Let SIGTERM, SIGINT, SIGHUP, SIGUSR1 only ask to stop in the block; a second one ends it.

    SIGHUP and SIGUSR1 are never that second one: a closed terminal and Slurm send several. Yields a
    function that gives the name of the signal received, or None. A thread other than the main one
    cannot handle signals; there nothing changes.
    """
    received = []

    def receive(number: int, frame) -> None:
        received.append(signal.Signals(number).name)
        for each in handlers:
            signal.signal(each, signal.SIG_IGN if each in REPEATED else signal.SIG_DFL)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGTERM, signal.SIGINT, *REPEATED):
            if signal.getsignal(each) is not signal.SIG_IGN:
                handlers[each] = signal.signal(each, receive)
    try:
        yield lambda: received[0] if received else None
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
