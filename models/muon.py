"""Muon: matrices of a network move along their orthogonalised momentum, the rest as by Adam."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

SMALLEST = 8  # rows and columns from which a weight counts as a matrix: no map to a few channels
MOMENTUM = 0.95
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


def is_matrix(weight: Tensor) -> bool:
    """Whether `weight` (rows, ...), its axes but the first taken as one, is a matrix to Muon."""
    rows = len(weight) if weight.ndim > 1 else 0
    return min(rows, weight.numel() // max(rows, 1)) >= SMALLEST


def orthogonalise(x: Tensor) -> Tensor:
    """Matrices `x` (k, rows, columns) with singular values brought to about 1, by Newton-Schulz.

    A singular value s becomes a s + b s^3 + c s^5, `STEPS` times, of x / |x|: between 0.68 and 1.14
    in the end for those above a hundredth of |x|, and less for smaller ones.
    """
    a, b, c = COEFFICIENTS
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    wide = wide / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    for _ in range(STEPS):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


class Muon(torch.optim.Adam):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, Adam for the rest.

    Convolutions are matrices (outputs, inputs x height x width). A matrix moves by lr times
    0.2 sqrt(max(rows, columns)), so that entries move about as far as by Adam and one learning rate
    fits both (Liu et al. 2025, arXiv 2502.16982). Of Adam's options, a matrix heeds `lr` and
    `weight_decay`; of its moments it has `exp_avg`. As in Adam's fused step, nothing changes where
    `found_inf` is 1.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        matrices = [p for p in group["params"] if p.grad is not None and is_matrix(p)]
        gradients = [p.grad for p in matrices]
        for p in matrices:  # Adam leaves what has no gradient as it is
            p.grad = None
        super().step(closure)
        same_shape = defaultdict(list)
        for p, gradient in zip(matrices, gradients, strict=True):
            p.grad = gradient
            same_shape[len(p), p.numel() // len(p)].append(p)
        for alike in same_shape.values():
            self._move(alike, group["lr"], group["weight_decay"])

    def _move(self, weights: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Muon's step of `weights` of one shape, as a batch of matrices."""
        averages = [self.state[p]["exp_avg"] for p in weights]
        gradient = torch.stack([p.grad.flatten(1) for p in weights])
        if weight_decay:
            gradient = gradient + weight_decay * torch.stack([p.flatten(1) for p in weights])
        momentum = torch.stack([average.flatten(1) for average in averages])
        momentum = momentum.lerp(gradient, 1 - MOMENTUM)
        step = orthogonalise(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
        size = 0.2 * math.sqrt(max(step.shape[1:])) * lr
        moves = torch.as_tensor(1.0 - getattr(self, "found_inf", 0.0), device=step.device) > 0
        for p, average, m, o in zip(weights, averages, momentum, step, strict=True):
            average.copy_(torch.where(moves, m.view(p.shape), average))
            p.sub_(torch.where(moves, size * o.view(p.shape), 0.0))
