"""Bias, leaky ReLU and scale in one step, as in StyleGAN2."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from op import extension


def fused_leaky_relu(
    x: torch.Tensor, bias: torch.Tensor, negative_slope: float = 0.2, scale: float = 2**0.5
) -> torch.Tensor:
    """Returns `scale * leaky_relu(x + bias)`, differentiable to any order.

    Args:
        x: `(B, C, ...)`, floating point.
        bias: `(C,)`, added to every channel, converted to the dtype of `x`.
        negative_slope: factor of negative values. Any number.
        scale: factor of all values. The default keeps the mean square of a centred input where
            the slope is small.

    Raises:
        ValueError: `x` has no channels, or `bias` has another length than they number.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point of shape (B, C, ...), not {x.dtype} of {tuple(x.shape)}"
        )
    if bias.shape != x.shape[1:2]:
        raise ValueError(
            f"bias must be of shape ({x.shape[1]},), one number for each channel of x, "
            f"not {tuple(bias.shape)}"
        )
    bias = bias.to(x.dtype)
    kernels = extension.kernels(x)
    if kernels is None:
        return F.leaky_relu(x + bias.view(-1, *[1] * (x.ndim - 2)), negative_slope) * scale

    def run(x: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        tensors = (None if t is None else t.contiguous() for t in (x, bias, grad))
        return kernels.fused_leaky_relu(*tensors, negative_slope, scale)

    return FusedLeakyReLU.apply(x, bias, run)


class FusedLeakyReLU(torch.autograd.Function):
    """The operator through `run(x, bias, grad)`, which need not be differentiable.

    With `grad` None, `run` returns the output; else the input's gradient for that of the output.
    This gradient is linear in `grad`, so its own gradient is itself, and flat in `x` and `bias`.
    """

    @staticmethod
    def forward(
        x: torch.Tensor, bias: torch.Tensor, run: Callable, grad: torch.Tensor | None = None
    ) -> torch.Tensor:
        return run(x, bias, grad)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        x, bias, ctx.run, grad = inputs
        ctx.is_gradient = grad is not None
        ctx.save_for_backward(x, bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        grad = FusedLeakyReLU.apply(*ctx.saved_tensors, ctx.run, grad)
        if ctx.is_gradient:
            return None, None, None, grad
        return grad, grad.sum([i for i in range(grad.ndim) if i != 1]), None, None
