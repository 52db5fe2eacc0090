"""Up-sample, filter, down-sample: the FIR resampling of StyleGAN2 and NCSN++."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from op import extension

# Two 1-D passes beat one 2-D pass from about this many taps on (CPU, float32; measured with 3x3
# to 12x12 filters). Below, the memory traffic of the second pass costs more than it saves.
SEPARATE_FROM_TAPS = 36


def upfirdn2d(
    x: torch.Tensor, kernel: torch.Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Inserts zeros, pads, convolves with an FIR filter, and keeps every `down`-th pixel.

    Every channel is filtered alike and both axes have the same factors and padding. It is a true
    convolution: the filter is flipped. Differentiable to any order with respect to `x`.

    Args:
        x: images `(B, C, H, W)`, floating point.
        kernel: the filter `(kh, kw)`, a constant, of any device and floating dtype.
        up: `up - 1` zeros follow each pixel, at least 1.
        down: keep the first of every `down` pixels, at least 1.
        pad: zeros before and after each axis, after `up`; a negative number crops.

    Returns:
        `(B, C, H', W')` with `H' = (H * up + pad[0] + pad[1] - kh) // down + 1`, and `W'` likewise,
        of the dtype and device of `x`.

    Raises:
        ValueError: an argument is out of its range, or the output would be empty.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020.
    """
    _check(x, kernel, up, down, pad)
    whole = Pass(kernel.detach(), (up, up), (down, down), (tuple(pad), tuple(pad)))
    if min(whole.output_size(x.shape[2:])) < 1:
        raise ValueError(
            f"upfirdn2d of {tuple(x.shape[2:])} images has no output pixel with a filter of "
            f"{tuple(kernel.shape)}, up={up}, pad={tuple(pad)}; pad more or crop less"
        )
    kernels = extension.kernels(x)

    def run_kernel(x: torch.Tensor, step: Pass) -> torch.Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # that of the sums
        kernel = step.kernel.to(x.device, dtype).contiguous()
        before, size = tuple(pad[0] for pad in step.pad), step.output_size(x.shape[2:])
        return kernels.upfirdn2d(x.contiguous(), kernel, step.up, step.down, before, size)

    for step in _separate(whole):
        if kernels is None:
            with torch.autocast(x.device.type, enabled=False):  # the result has the dtype of x
                x = run_plain(x, step)
        else:
            x = UpFirDn2d.apply(x, step, run_kernel)
    return x


class Pass(NamedTuple):
    """One filter pass. Every pair is (vertical, horizontal)."""

    kernel: torch.Tensor
    up: tuple[int, int]
    down: tuple[int, int]
    pad: tuple[tuple[int, int], tuple[int, int]]

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for images of `size`."""
        return tuple(
            (n * up + sum(pad) - taps) // down + 1
            for n, taps, up, down, pad in zip(size, self.kernel.shape, *self[1:], strict=True)
        )

    def adjoint(self, size: tuple[int, int]) -> "Pass":
        """The transposed linear map, from output gradients to gradients of images of `size`.

        Again a pass: factors swapped, filter flipped, and padded so that the first pixel meets
        the same tap and the size comes out as `size`.
        """
        axes = zip(size, self.output_size(size), self.kernel.shape, *self[1:], strict=True)
        pad = tuple(
            (taps - 1 - pad[0], n * up - out * down + pad[0] - up + 1)
            for n, out, taps, up, down, pad in axes
        )
        return Pass(self.kernel.flip(0, 1), self.down, self.up, pad)


class UpFirDn2d(torch.autograd.Function):
    """A pass through `run(x, step)`, which need not be differentiable; all derivatives are passes.

    The map is linear, so its gradient is its adjoint applied to the output's gradient, whose
    gradient is again the adjoint's adjoint, and so on.
    """

    @staticmethod
    def forward(x: torch.Tensor, step: Pass, run: Callable) -> torch.Tensor:
        return run(x, step)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        x, step, ctx.run = inputs
        ctx.adjoint = step.adjoint(tuple(x.shape[2:]))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        return UpFirDn2d.apply(grad, ctx.adjoint, ctx.run), None, None


def run_plain(x: torch.Tensor, step: Pass) -> torch.Tensor:
    """A pass in plain PyTorch: a depthwise convolution, or a transposed one where `up > 1`."""
    channels, taps = x.shape[1], step.kernel.shape
    weight = step.kernel.to(x).expand(channels, 1, *taps)
    if step.up == (1, 1):
        padding = tuple(before for before, _ in step.pad)
        if min(padding) < 0 or any(before != after for before, after in step.pad):
            x, padding = _pad(x, step.pad), 0
        return F.conv2d(x, weight.flip(2, 3), None, step.down, padding, groups=channels)

    # The transposed convolution is the full one, without the zeros after the last pixel. What it
    # has too much is cropped by its own padding where that can be said so, else afterwards.
    crop = [
        (n - 1 - pad[0], n - up - pad[1])
        for n, up, pad in zip(taps, step.up, step.pad, strict=True)
    ]
    padding = [before for before, _ in crop]
    extra = [before - after for before, after in crop]
    if min(padding) >= 0 and all(0 <= e < up for e, up in zip(extra, step.up, strict=True)):
        x = F.conv_transpose2d(x, weight, None, step.up, padding, extra, channels)
    else:
        x = F.conv_transpose2d(x, weight, None, step.up, groups=channels)
        x = _pad(x, [(-before, -after) for before, after in crop])
    return x[:, :, :: step.down[0], :: step.down[1]]


def _pad(x: torch.Tensor, pad: list[tuple[int, int]]) -> torch.Tensor:
    """Pads with zeros, then crops: in this order a crop may reach into the padding."""
    (top, bottom), (left, right) = pad
    widths = (left, right, top, bottom)
    x = F.pad(x, [max(n, 0) for n in widths])
    return F.pad(x, [min(n, 0) for n in widths])


def _separate(whole: Pass) -> list[Pass]:
    """A vertical and a horizontal pass where the filter is an outer product and two passes pay."""
    rows, columns = whole.kernel.shape
    if min(rows, columns) == 1 or rows * columns < SEPARATE_FROM_TAPS:
        return [whole]
    kernel = whole.kernel.double().cpu()
    row, column = divmod(int(kernel.abs().argmax()), columns)
    vertical, horizontal = kernel[:, column], kernel[row] / kernel[row, column]
    rounding = torch.finfo(whole.kernel.dtype).eps * kernel[row, column].abs()
    if not (torch.outer(vertical, horizontal) - kernel).abs().max() <= 4 * rounding:
        return [whole]
    up, down, pad = whole.up, whole.down, whole.pad
    device = whole.kernel.device  # the factors stay float64: rounding them would add an error
    return [
        Pass(vertical[:, None].to(device), (up[0], 1), (down[0], 1), (pad[0], (0, 0))),
        Pass(horizontal[None].to(device), (1, up[1]), (1, down[1]), ((0, 0), pad[1])),
    ]


def _check(x: torch.Tensor, kernel: torch.Tensor, up: int, down: int, pad: tuple[int, int]) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point images (B, C, H, W), not {x.dtype} of shape {tuple(x.shape)}"
        )
    if kernel.ndim != 2 or not kernel.is_floating_point() or not kernel.numel():
        raise ValueError(
            "kernel must be a floating point filter (kh, kw), "
            f"not {kernel.dtype} of shape {tuple(kernel.shape)}"
        )
    if kernel.requires_grad:
        raise ValueError("kernel is a constant and gets no gradient; pass kernel.detach()")
    if up < 1 or down < 1:
        raise ValueError(f"up and down must be at least 1, not {up} and {down}")
    if len(pad) != 2:
        raise ValueError(f"pad must be (before, after), the same for both axes, not {pad}")
