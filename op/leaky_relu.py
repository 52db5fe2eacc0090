"""Bias, leaky ReLU and scale in one step, as in StyleGAN2."""

import torch
import torch.nn.functional as F

from op import extension


def fused_leaky_relu(
    x: torch.Tensor, bias: torch.Tensor, negative_slope: float = 0.2, scale: float = 2**0.5
) -> torch.Tensor:
    """Return `scale * leaky_relu(x + bias)`, differentiable to any order.

    Args:
        x: `(B, C, ...)`, floating point.
        bias: `(C,)`, added to every channel, converted to the dtype of `x`.
        negative_slope: factor of negative values. Any number.
        scale: factor of all values. The default keeps the mean square of a centred input where
            the slope is small.

    Raises:
        ValueError: `x` has no axis of channels, or `bias` has not one entry for each.

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
    if extension.enabled(x):
        return _operator(x, bias, None, negative_slope, scale)
    return F.leaky_relu(_biased(x, bias), negative_slope) * scale


def _biased(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x + bias.view(len(bias), *[1] * (x.ndim - 2))


@torch.library.custom_op("pfgm::fused_leaky_relu", mutates_args=())
def _operator(
    x: torch.Tensor,
    bias: torch.Tensor,
    grad: torch.Tensor | None,
    negative_slope: float,
    scale: float,
) -> torch.Tensor:
    """The output or, where `grad` is that of the output, the gradient of `x`."""
    kernels = extension.kernels(x)
    if kernels is None:
        biased = _biased(x, bias)
        through = biased if grad is None else grad
        out = torch.where(biased > 0, through * scale, through * (negative_slope * scale))
    else:
        tensors = (None if t is None else t.contiguous() for t in (x, bias, grad))
        out = kernels.fused_leaky_relu(*tensors, negative_slope, scale)
    return out.contiguous(memory_format=extension.memory_format(x))


@_operator.register_fake
def _(x, bias, grad, negative_slope, scale):
    return torch.empty_like(x, memory_format=extension.memory_format(x))


def _save(ctx, inputs: tuple, output: torch.Tensor) -> None:
    x, bias, grad, *ctx.constants = inputs
    ctx.is_gradient = grad is not None
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad: torch.Tensor) -> tuple:
    # The gradient is linear in `grad`, so its own gradient is itself, and flat in `x` and `bias`.
    grad = _operator(*ctx.saved_tensors, grad, *ctx.constants)
    if ctx.is_gradient:
        return None, None, grad, None, None
    return grad, grad.sum([i for i in range(grad.ndim) if i != 1]), None, None, None


_operator.register_autograd(_backward, setup_context=_save)
