"""Muon: weight matrices are updated along their orthogonalised momentum, all else by Adam."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from execution import full_float32

SMALLEST = 8  # rows and columns from which a weight counts as a matrix
MOMENTUM = 0.95
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-18  # of a divisor: squares of entries below 1e-19 underflow in float32


def mark_tables(network: nn.Module) -> None:
    """Mark the weights of embedding tables in `network`, for `is_matrix` to exclude them."""
    for module in network.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.weight.is_table = True


def is_matrix(parameter: nn.Parameter) -> bool:
    """True for a weight (rows, ...) that Muon updates; all axes but the first are columns.

    It has at least `SMALLEST` rows and `SMALLEST` columns, which excludes the last layer, whose
    rows are the channels of an image. Tables (`mark_tables`) are excluded too.
    """
    if parameter.ndim < 2 or getattr(parameter, "is_table", False):
        return False
    return min(len(parameter), parameter[0].numel()) >= SMALLEST


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """`matrices` (rows, columns) with their singular values brought to about 1, by Newton-Schulz.

    A singular value s of x / |x|, in the Frobenius norm, is replaced `STEPS` times by

        a s + b s^3 + c s^5,    (a, b, c) = `COEFFICIENTS`.

    The result lies between 0.68 and 1.21 where s is above 0.0015, and is about 485 s below.

    Each step multiplies x by a polynomial of x x^T. The product of these polynomials is computed
    first, for all matrices of the same smaller side at once, so that the larger side takes part in
    two products and not in ten.
    """
    wide = [x if len(x) <= x.shape[1] else x.mT for x in matrices]
    wide = [x / x.norm().clamp(min=SMALLEST_NORM) for x in wide]
    same_side = defaultdict(list)
    for k, x in enumerate(wide):
        same_side[len(x)].append(k)
    with full_float32():  # x x^T has the squares of the singular values: TF32 would lose small ones
        for places in same_side.values():
            gram = torch.stack([wide[k] @ wide[k].mT for k in places])
            product = factor = _polynomial(gram)
            for _ in range(STEPS - 1):
                gram = factor @ gram @ factor
                factor = _polynomial(gram)
                product = factor @ product
            for k, p in zip(places, product, strict=True):
                wide[k] = p @ wide[k]
    return [y if len(x) <= x.shape[1] else y.mT for x, y in zip(matrices, wide, strict=True)]


def _polynomial(gram: Tensor) -> Tensor:
    """a + b `gram` + c `gram`^2, (k, n, n)."""
    a, b, c = COEFFICIENTS
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.baddbmm(a * one + b * gram, gram, gram, alpha=c)


class Muon(torch.optim.Adam):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, Adam for the rest.

    A matrix, here, is a weight whose state has no `exp_avg_sq`; `optimizers.muon` makes the state.
    Convolutions are matrices (outputs, inputs x height x width). The update of a matrix is

        lr * 0.2 sqrt(max(rows, columns)) * the orthogonalised momentum,

    which changes its entries about as much as Adam does, so that one learning rate fits both (Liu
    et al. 2025, arXiv 2502.16982). Of Adam's options, matrices use `lr`, and `weight_decay`, which
    is added to the gradient. As in Adam's fused step, nothing changes where `found_inf` is 1.
    """

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        trained = [p for p in group["params"] if p.grad is not None]
        matrices = [p for p in trained if "exp_avg_sq" not in self.state[p]]
        gradients = [p.grad for p in matrices]
        for p in matrices:  # Adam leaves what has no gradient as it is
            p.grad = None
        super().step()
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
        ]  # averaged with itself, the momentum stays as it is
        torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
        steps = torch._foreach_lerp(gradients, averages, MOMENTUM)  # Nesterov's
        lr = lr * ~skipped
        for p, step in zip(matrices, orthogonalise([s.flatten(1) for s in steps]), strict=True):
            p.sub_(step.view(p.shape) * (0.2 * math.sqrt(max(step.shape)) * lr))
