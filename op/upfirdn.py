"""Up-sample, filter, down-sample: the FIR resampling of StyleGAN2 and NCSN++."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from op import extension

# Two 1-D passes beat one 2-D pass from about this many taps on (CPU, float32; measured with 3x3
# to 12x12 filters). Below, the memory traffic of the second pass costs more than it saves.
SEPARATE_FROM_TAPS = 36

PIXELS = 2**30 - 1  # fewer in a plane with its zeros, so that the kernels' 32 bits suffice


def upfirdn2d(
    x: torch.Tensor, kernel: torch.Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Insert zeros, pad, convolve with an FIR filter, and keep every `down`-th pixel.

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
        ValueError: an argument is out of its range, the output would be empty, or a plane with its
            zeros would have some 2^30 pixels or more.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020.
    """
    _check(x, kernel, up, down, pad)
    return filtered(x, Pass(kernel.detach(), (up, up), (down, down), (*pad, *pad)))


def filtered(x: torch.Tensor, whole: "Pass") -> torch.Tensor:
    """`x` (B, C, H, W) after a pass, whose factors and padding may differ between the axes.

    It is differentiable, and raises ValueError for sizes as `upfirdn2d` does.
    """
    _check_size(whole, x.shape[2:])
    dtype = torch.promote_types(x.dtype, torch.float32)  # that of the sums
    for step in _separate(whole):
        step = step._replace(kernel=step.kernel.to(x.device, dtype))
        # On the CPU PyTorch's own operators, which the compiler fuses and autograd differentiates
        # at no extra cost. On a GPU one operator: it stays in every traced graph, where the kernels
        # need not even be built, and none of its inside is traced.
        x = _operator(x, *step) if extension.enabled(x) else run_plain(x, step)
    return x


class Pass(NamedTuple):
    """One filter pass, as the operator takes it. Factors are (vertical, horizontal)."""

    kernel: torch.Tensor
    up: Sequence[int]
    down: Sequence[int]
    pad: Sequence[int]  # top, bottom, left, right

    def axes(self) -> Iterator[tuple]:
        """Number of taps, up, down and (before, after), the padding, of each axis."""
        return zip(self.kernel.shape, self.up, self.down, (self.pad[:2], self.pad[2:]), strict=True)

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output for images of `size`."""
        return tuple(
            (n * up + sum(pad) - taps) // down + 1
            for n, (taps, up, down, pad) in zip(size, self.axes(), strict=True)
        )

    def adjoint(self, size: Sequence[int]) -> "Pass":
        """The transposed linear map, from output gradients to gradients of images of `size`.

        Again a pass: factors swapped, filter flipped, and padded so that the first pixel meets
        the same tap and the size comes out as `size`.
        """
        pad = []
        for n, out, axis in zip(size, self.output_size(size), self.axes(), strict=True):
            taps, up, down, (before, _) = axis
            pad += [taps - 1 - before, n * up - out * down + before - up + 1]
        return Pass(self.kernel.flip(0, 1), self.down, self.up, pad)


@torch.library.custom_op("pfgm::upfirdn2d", mutates_args=())
def _operator(
    x: torch.Tensor,
    kernel: torch.Tensor,
    up: Sequence[int],
    down: Sequence[int],
    pad: Sequence[int],
) -> torch.Tensor:
    # Where there are no kernels it computes all the same: an exported program may run anywhere.
    step = Pass(kernel, up, down, pad)
    kernels = extension.kernels(x)
    if kernels is None:
        return run_plain(x, step)
    before, size = (pad[0], pad[2]), step.output_size(x.shape[2:])
    out = kernels.upfirdn2d(x.contiguous(), kernel.contiguous(), up, down, before, size)
    return out.contiguous(memory_format=extension.memory_format(x))


@_operator.register_fake
def _(x, kernel, up, down, pad):
    shape = *x.shape[:2], *Pass(kernel, up, down, pad).output_size(x.shape[2:])
    layout = extension.memory_format(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _save(ctx, inputs: tuple, output: torch.Tensor) -> None:
    x, kernel, *ctx.factors = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(kernel)


def _backward(ctx, grad: torch.Tensor) -> tuple:
    # The map is linear: its gradient is its adjoint, again a pass, and so on for any order.
    step = Pass(*ctx.saved_tensors, *ctx.factors)
    return _operator(grad, *step.adjoint(ctx.size)), None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)


def run_plain(x: torch.Tensor, step: Pass) -> torch.Tensor:
    """A pass in plain PyTorch: a depthwise convolution, or a transposed one where `up > 1`."""
    # In the dtype of the sums: in bfloat16 the CPU's transposed convolution, which is also the
    # gradient of the other, is slow (5 to 50 times) and multiplies infinities by padded taps.
    with torch.autocast(x.device.type, enabled=False):
        out = _convolve(x.to(torch.promote_types(x.dtype, torch.float32)), step)
    return out.to(x.dtype).contiguous(memory_format=extension.memory_format(x))


def _convolve(x: torch.Tensor, step: Pass) -> torch.Tensor:
    channels = x.shape[1]
    weight = step.kernel.to(x).expand(channels, 1, *step.kernel.shape)
    if max(step.up) == 1:
        padding = step.pad[::2]
        if min(padding) < 0 or padding != step.pad[1::2]:
            x, padding = _pad(x, step.pad), 0
        return F.conv2d(x, weight.flip(2, 3), None, step.down, padding, groups=channels)

    # The transposed convolution is the full one, without the zeros after the last pixel. The excess
    # is cropped by its own padding where that has such a form, else afterwards.
    crop = [n for taps, up, _, pad in step.axes() for n in (taps - 1 - pad[0], taps - up - pad[1])]
    padding = crop[::2]
    extra = [before - after for before, after in zip(padding, crop[1::2], strict=True)]
    if min(padding) >= 0 and all(0 <= e < up for e, up in zip(extra, step.up, strict=True)):
        x = F.conv_transpose2d(x, weight, None, step.up, padding, extra, channels)
    else:
        x = F.conv_transpose2d(x, weight, None, step.up, groups=channels)
        x = _pad(x, [-n for n in crop])
    return x[:, :, :: step.down[0], :: step.down[1]]


def _pad(x: torch.Tensor, pad: Sequence[int]) -> torch.Tensor:
    """Pad with zeros, then crop: in this order a crop may reach into the padding."""
    widths = (*pad[2:], *pad[:2])
    x = F.pad(x, [max(n, 0) for n in widths])
    return F.pad(x, [min(n, 0) for n in widths])


def _separate(whole: Pass) -> list[Pass]:
    """A vertical and a horizontal pass where the filter is an outer product and two passes pay."""
    rows, columns = whole.kernel.shape
    if min(rows, columns) == 1 or rows * columns < SEPARATE_FROM_TAPS:
        return [whole]
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return [whole]  # a graph that is traced has no values of the filter
    kernel = whole.kernel.double().cpu()
    row, column = divmod(int(kernel.abs().argmax()), columns)
    vertical, horizontal = kernel[:, column], kernel[row] / kernel[row, column]
    rounding = torch.finfo(whole.kernel.dtype).eps * kernel[row, column].abs()
    if not (torch.outer(vertical, horizontal) - kernel).abs().max() <= 4 * rounding:
        return [whole]
    up, down, pad = whole.up, whole.down, whole.pad
    device = whole.kernel.device  # the factors stay float64: rounding them would add an error
    return [
        Pass(vertical[:, None].to(device), (up[0], 1), (down[0], 1), (*pad[:2], 0, 0)),
        Pass(horizontal[None].to(device), (1, up[1]), (1, down[1]), (0, 0, *pad[2:])),
    ]


def _check(x: torch.Tensor, kernel: torch.Tensor, up: int, down: int, pad: tuple[int, int]) -> None:
    if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(
            "x must be floating point images (B, C, H, W), none of C, H and W 0, "
            f"not {x.dtype} of shape {tuple(x.shape)}"
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


def _check_size(whole: Pass, size: Sequence[int]) -> None:
    """Raise ValueError unless there are output pixels, and fewer in between than 2^30."""
    out = whole.output_size(size)
    (up, _), (down, _), pad = whole.up, whole.down, tuple(whole.pad[:2])
    if min(out) < 1:
        raise ValueError(
            f"upfirdn2d of {tuple(size)} images has no output pixel with a filter of "
            f"{tuple(whole.kernel.shape)}, up={up}, pad={pad}; pad more or crop less"
        )
    height, width = (
        max(n * up + max(before, 0) + max(after, 0), m * down)
        for n, m, (_, up, down, (before, after)) in zip(size, out, whole.axes(), strict=True)
    )
    pixels = height * width
    if pixels >= PIXELS:
        raise ValueError(
            f"upfirdn2d of {tuple(size)} images with up={up}, down={down}, pad={pad} counts "
            f"{pixels} pixels, zeros included, where fewer than 2^30 are possible"
        )
