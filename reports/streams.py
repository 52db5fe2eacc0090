"""Standard streams of a program that goes on where nobody reads what it prints."""

import io
import os
import select
import sys


class _Lenient(io.FileIO):
    """A file whose writes never fail: what it cannot take is dropped."""

    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # a reader that is slow
                select.select([], [self], [])
            return written
        except OSError:  # a pipe without a reader, a full disk, a terminal that was closed
            return len(data)


def make_lenient() -> None:
    """Replace stdout and stderr by streams that never fail, whatever happens to their readers.

    Closed descriptors are opened on /dev/null, so that no file of the program takes their place.
    Letters that a stream's encoding lacks are printed as escapes.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # takes the lowest number that is free, this one, for the program's children too
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        raw = _Lenient(descriptor, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=old.encoding if old else "utf-8",
            errors="backslashreplace",
            line_buffering=old.line_buffering if old else False,
            write_through=old.write_through if old else False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)  # which Python flushes last
