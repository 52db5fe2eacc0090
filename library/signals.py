"""Signals that ask a program to stop after its step, with all saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

REPEATED = signal.SIGHUP, signal.SIGUSR1  # signals that may be sent several times


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Turn SIGTERM, SIGINT, SIGHUP, SIGUSR1 into a request to stop; a second one ends the process.

    This holds within the `with` block. SIGHUP and SIGUSR1 do not count as a second signal, since a
    closed terminal and Slurm send several. Yields a function that returns the name of the signal
    received, or None. Only the main thread can handle signals; in another one nothing changes.
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
