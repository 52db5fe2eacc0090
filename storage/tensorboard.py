"""TensorBoard's files: a writer, and the curves that are read back."""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from storage.files import naming, one_line
from storage.records import whole_records

log = logging.getLogger(__name__)

FLUSH_SECONDS = 10  # TensorBoard shows curves that are at most so old


class TensorBoardWriter:
    """TensorBoard's log, whose methods raise OSError where writing fails; see `loggers.Loggers`.

    `tensorboardX.SummaryWriter` writes from a thread that a full disk ends, whereupon the run waits
    for it for ever; and a kill loses the events that it still holds. Here the caller writes events,
    which are on disk at most `FLUSH_SECONDS` later or with `flush`.
    """

    def __init__(self, folder: Path, step: int):
        """Start a file in `folder`; what a killed run logged beyond `step` is purged."""
        folder.mkdir(parents=True, exist_ok=True)
        # Names are read in their order, and start with a time: but clocks are set back. The number
        # is above all that are there, so that no link can be in the new file's place.
        starts = [re.match(r"events\.start(\d+)", path.name) for path in _event_files(folder)]
        number = 1 + max((int(start[1]) for start in starts if start), default=0)
        self.folder, self.flushed = folder, 0.0
        self.events = EventsWriter(str(folder / f"events.start{number:06}"))
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._write(step, summary=summary.scalar(tag, value))

    def add_image(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """`image` is (H, W, C)."""
        self._write(step, summary=summary.image(tag, image, dataformats="HWC"))

    def flush(self) -> None:
        """Write what was added to disk."""
        with naming(self.folder):
            self.events.flush()
        self.flushed = time.monotonic()

    close = flush

    def _write(self, step: int, **content) -> None:
        with naming(self.folder):
            self.events.write_event(Event(step=step, wall_time=time.time(), **content))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.*tfevents.*"))


def _events(path: Path) -> Iterator[Event]:
    try:
        yield from map(Event.FromString, whole_records(path))
    except (DecodeError, OSError, ValueError) as error:
        lacks = "the loss curve lacks what follows in it"
        log.warning(f"{path} is damaged: {one_line(error)}; {lacks}")


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of TensorBoard's files, as far as they are whole."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for event in chain.from_iterable(map(_events, _event_files(folder))):
        if event.session_log.status == SessionLog.START:  # a run resumed before this step
            for tag, points in curves.items():
                curves[tag] = {s: v for s, v in points.items() if s < event.step}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                curves[value.tag][event.step] = value.simple_value
    return {tag: sorted(points.items()) for tag, points in curves.items()}


def seconds_of_training(folder: Path, step: int) -> float:
    """Time that the processes which wrote these files took, each from its start to `step`."""
    total = 0.0
    for path in _event_files(folder):
        times = [event.wall_time for event in _events(path) if event.step <= step]
        total += max(times, default=0.0) - min(times, default=0.0)
    return total
