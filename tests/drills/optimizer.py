"""New optimisers in one file: AdamW with groups, RAdam, and Lion (Chen et al. 2023, 2302.06675)."""

import ml_collections
import torch

import optimizers
from configs.vp import digits_ddpmpp


def adamw(parameters, options) -> torch.optim.AdamW:
    """No weight decay of vectors: biases, and scales of norms."""
    groups = [
        {"params": [p for _, p in parameters if p.dim() > 1]},
        {"params": [p for _, p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options["lr"], weight_decay=options["weight_decay"])


def radam(parameters, options) -> torch.optim.RAdam:
    return torch.optim.RAdam([p for _, p in parameters], lr=options["lr"])


class Lion(torch.optim.Optimizer):
    """Steps of one size along the sign of a momentum."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, (beta1, beta2) = self.state[p], group["betas"]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(momentum.lerp(p.grad, 1 - beta1).sign(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - beta2)


def lion(parameters, options) -> Lion:
    betas = options["beta1"], options["beta2"]
    defaults = {"lr": options["lr"], "betas": betas, "weight_decay": options["weight_decay"]}
    return Lion([p for _, p in parameters], defaults)


optimizers.OPTIMIZERS |= {"adamw": adamw, "radam": radam, "lion": lion}


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.optim.update(optimizer="lion", lr=1e-4, beta2=0.99, weight_decay=0.1)
    return config
