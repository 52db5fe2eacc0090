"""Signals that ask a program to stop after its step, with all saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Let SIGTERM, SIGINT and SIGHUP only ask to stop in the block; a second ends the process.

    A SIGHUP is never that second one: a closed terminal sends several. Yields a function that gives
    the name of the signal received, or None. A thread other than the main one cannot handle
    signals; there nothing changes.
    """
    received = []

    def receive(number: int, frame) -> None:
        received.append(signal.Signals(number).name)
        for each in handlers:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(each) is not signal.SIG_IGN:
                handlers[each] = signal.signal(each, receive)
    try:
        yield lambda: received[0] if received else None
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
