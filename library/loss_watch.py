"""A check that the losses of a training are finite."""

import logging
import math

import torch
from torch import Tensor

import distributed
from processes.watch import did

log = logging.getLogger(__name__)


class LossWatch:
    """Check for losses that are not finite, of several steps at once: no step waits for its device.

    Args:
        max_bad_steps: number of losses in a row that are not finite after which the run ends.
        nonfinite, precision: values of `optim.nonfinite` and `training.precision`, which the
            messages name.
    """

    def __init__(self, max_bad_steps: int, nonfinite: str, precision: str = "fp32"):
        self.consequence = f"optim.nonfinite={nonfinite!r}"
        if precision == "fp16":
            self.consequence = "the step is skipped and the scale of the loss is halved"
        self.limit, self.bad_in_a_row, self.newest = max_bad_steps, 0, math.nan
        self.losses: dict[int, Tensor] = {}  # by the batch's number, since the last check

    def add(self, batch: int, loss: Tensor) -> None:
        """Note the loss of a step on batch number `batch`, as `train_step` returns it."""
        self.losses[batch] = loss
        did(f"the step on batch {batch}")
        if len(self.losses) >= self.limit:
            self.look()

    def look(self) -> float:
        """Newest loss; warn of each that is not finite, raise at `max_bad_steps` in a row."""
        if not self.losses:
            return self.newest
        losses = distributed.mean(torch.stack([*self.losses.values()])).tolist()
        for batch, loss in zip(self.losses, losses, strict=True):
            self.newest = loss
            self.bad_in_a_row = 0 if math.isfinite(loss) else self.bad_in_a_row + 1
            if self.bad_in_a_row:
                log.warning(
                    f"batch {batch}: the loss or its gradient is not finite "
                    f"({self.consequence}, {self.bad_in_a_row} in a row)"
                )
            if self.bad_in_a_row == self.limit:
                raise FloatingPointError(
                    f"the loss or its gradient was not finite for training.max_bad_steps="
                    f"{self.limit} batches in a row, the last one number {batch}; the weights "
                    "from before are intact, and so is the last checkpoint"
                )
        self.losses = {}
        return self.newest
