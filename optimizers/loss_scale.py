"""The factor of a loss whose gradients are computed in float16."""

import torch
from torch import Tensor

FIRST = 2.0**16
LEAST = 2.0**-24  # halved for ever, as in a training that has diverged, it would become 0
PATIENCE = 2000  # finite steps in a row after which the factor is doubled


class LossScale:
    """Factor that keeps small gradients above the smallest number of float16, 6e-8.

    It is halved where a gradient is not finite, and doubled after `PATIENCE` finite ones in a row
    (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2, with the numbers of
    `torch.amp.GradScaler`). The host never waits for it.

    Attributes:
        factor: 0-d, float32.
        finite_steps: number of finite steps in a row, 0-d, int32.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.factor = torch.tensor(FIRST, device=device)
        self.finite_steps = torch.tensor(0, dtype=torch.int32, device=device)

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the `gradients` of the scaled loss by the factor."""
        torch._foreach_mul_(gradients, 1 / self.factor)

    def update(self, finite: Tensor) -> None:
        """Set the factor of the next step, after a gradient that was `finite` or not (0-d bool)."""
        steps = (self.finite_steps + 1) * finite
        grows = steps == PATIENCE
        self.factor *= torch.where(finite, 1.0 + grows, 0.5)
        self.factor.clamp_(min=LEAST)
        self.finite_steps.copy_(steps * ~grows)

    def state_dict(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "finite_steps": self.finite_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.factor.copy_(state["factor"])
        self.finite_steps.copy_(state["finite_steps"])
