"""A thread that writes checkpoints while training goes on."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from storage.tensors import map_tensors

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writer of copies of states, one after another, in a thread of its own.

    A state may change once it is copied. Copies from a GPU are made in pinned memory on a stream of
    their own, so that the host goes on at once, and only the device's next change of the state has
    to wait. At most one copy is in memory: the next state waits until the previous one is written.

    It is a context manager; leaving its block waits until everything is written.

    Args:
        device: the device of the states.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer")
        self._writing: Future | None = None

    def save(self, state: dict, write: Callable[[dict], None]) -> torch.cuda.Event | None:
        """Copy `state`, and let the thread call `write` with the copy.

        Returns:
            The event before which the device must not change the state; None: it may change now.

        Raises as `wait`.
        """
        self.wait()
        if self.device.type != "cuda":
            self._writing = self._thread.submit(write, map_tensors(_on_host, state))
            return None
        stream, event = torch.cuda.Stream(self.device), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            copy = map_tensors(_on_host, state)
            event.record(stream)

        def write_copied(original: dict) -> None:  # it keeps the original alive
            event.synchronize()
            write(copy)

        self._writing = self._thread.submit(write_copied, state)
        return event

    def check(self) -> None:
        """Raise the error of a write that has failed, without waiting for one."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until all is written; raise what `write` raised, such as OSError on a full disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._thread.shutdown()
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            log.warning(f"the last checkpoint is not written: {error}")  # besides why it ended


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the host; for a GPU's tensor complete once the current stream has reached it."""
    pinned = tensor.device.type == "cuda"
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
    return copy.copy_(tensor.detach(), non_blocking=pinned)
