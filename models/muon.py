"""Muon: matrices of a network move along their orthogonalised momentum, the rest as by Adam."""

import math
from collections import defaultdict

import torch
from torch import Tensor

SMALLEST = 8  # rows and columns from which a weight counts as a matrix: no map to a few channels
MOMENTUM = 0.95
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


def is_matrix(weight: Tensor) -> bool:
    """Whether `weight` (rows, ...), its axes but the first taken as one, is a matrix to Muon."""
    rows = len(weight) if weight.ndim > 1 else 0
    return min(rows, weight.numel() // max(rows, 1)) >= SMALLEST


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """`matrices` (rows, columns) with singular values brought to about 1, by Newton-Schulz.

    A singular value s of x / |x| becomes a s + b s^3 + c s^5, `STEPS` times: between 0.68 and 1.14
    in the end for those above a hundredth, and less for most smaller ones. Each step multiplies x
    by a polynomial of x x^T. The product of these is gathered first, of all matrices with the same
    smaller side at once, so that the larger side costs two products and not ten.
    """
    wide = [x if len(x) <= x.shape[1] else x.mT for x in matrices]
    tiny = torch.finfo(wide[0].dtype).tiny if wide else 0.0
    wide = [x / x.norm().clamp(min=tiny) for x in wide]
    alike = defaultdict(list)
    for k, x in enumerate(wide):
        alike[len(x)].append(k)
    found = list(wide)
    a, b, c = COEFFICIENTS
    for side, places in alike.items():
        gram = torch.stack([wide[k] @ wide[k].mT for k in places])
        one = torch.eye(side, dtype=gram.dtype, device=gram.device)
        product = one.expand_as(gram)
        for _ in range(STEPS):
            factor = torch.baddbmm(a * one + b * gram, gram, gram, alpha=c)
            product, gram = factor @ product, factor @ gram @ factor
        for k, p in zip(places, product, strict=True):
            found[k] = p @ wide[k]
    return [y if len(x) <= x.shape[1] else y.mT for x, y in zip(matrices, found, strict=True)]


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
        for p, gradient in zip(matrices, gradients, strict=True):
            p.grad = gradient
        if matrices:
            self._move(matrices, gradients, group["lr"], group["weight_decay"])

    def _move(
        self, matrices: list[Tensor], gradients: list[Tensor], lr: float, weight_decay: float
    ) -> None:
        averages = [self.state[p]["exp_avg"] for p in matrices]
        if weight_decay:
            gradients = torch._foreach_add(gradients, matrices, alpha=weight_decay)
        skipped = torch.as_tensor(getattr(self, "found_inf", 0.0), device=matrices[0].device) > 0
        gradients = [
            torch.where(skipped, m, g) for m, g in zip(averages, gradients, strict=True)
        ]  # an average of itself and itself stays
        torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
        steps = torch._foreach_lerp(gradients, averages, MOMENTUM)  # Nesterov's
        lr = lr * ~skipped
        for p, step in zip(matrices, orthogonalise([s.flatten(1) for s in steps]), strict=True):
            p.sub_(step.view(p.shape) * (0.2 * math.sqrt(max(step.shape)) * lr))
