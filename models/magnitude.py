"""Layers that keep the magnitude of activations: EDM2 (Karras et al. 2024, arXiv 2312.02696).

Section 2 and appendix B of the paper. Where the entries of an input have a mean square of 1, those
of the output have it too, in expectation over the weights. So no layer has a bias, and none needs a
normalisation that depends on the data.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1e-4  # added to a root mean square before it divides
SILU = 0.596  # root mean square of silu(x), x standard normal


def unit_magnitude(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`x` over the root mean square of its entries along `dim`."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # half would overflow
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    root_mean_square = norm * math.sqrt(norm.numel() / x.numel())
    return x / (root_mean_square + SMALLEST).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) over its root mean square for a standard normal x."""
    return F.silu(x) / SILU


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The mean (1 - t) a + t b, over its root mean square for independent `a` and `b`."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The channels of `a` and `b`, which contribute to the next layer in the ratio 1 - t to t."""
    of_a, of_b = a.shape[1], b.shape[1]
    scale = math.sqrt(of_a + of_b) / math.hypot(1 - t, t)
    parts = a * (scale * (1 - t) / math.sqrt(of_a)), b * (scale * t / math.sqrt(of_b))
    return torch.cat(parts, dim=1)


class MPLayer(nn.Module):
    """A convolution (B, in, H, W) to (B, out, H, W) without bias, zero padded; or a linear layer.

    It uses its weights at a root mean square of 1 for each output, over sqrt(fan-in). Pixels at the
    border, whose window is partly padding, come out smaller.

    Args:
        in_channels, out_channels: widths.
        size: side of the kernel, odd; 0: a linear layer, (B, in) to (B, out).
    """

    def __init__(self, in_channels: int, out_channels: int, size: int = 0):
        super().__init__()
        kernel = (size, size) if size else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def unit_weight(self) -> Tensor:
        return unit_magnitude(self.weight, tuple(range(1, self.weight.ndim)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.unit_weight() * (gain / math.sqrt(self.weight[0].numel()))
        weight = weight.to(x)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


@torch.no_grad()
def normalise_weights(network: nn.Module) -> None:
    """Bring the stored weights of each `MPLayer` to a root mean square of 1 for each output.

    Called at every step of training, so that weights do not grow and a learning rate means the same
    throughout ("forced weight normalization", section 2.3).
    """
    for layer in network.modules():
        if isinstance(layer, MPLayer):
            layer.weight.copy_(layer.unit_weight())


class MPFourier(nn.Module):
    """Random Fourier features (B, size) of noise labels (B,), of a mean square of 1."""

    def __init__(self, size: int):
        super().__init__()
        freqs, phases = 2 * math.pi * torch.randn(size), 2 * math.pi * torch.rand(size)
        self.freqs = nn.Parameter(freqs, requires_grad=False)
        self.phases = nn.Parameter(phases, requires_grad=False)

    def forward(self, noise_label: Tensor) -> Tensor:
        label = noise_label.to(self.freqs)
        return math.sqrt(2) * (torch.outer(label, self.freqs) + self.phases).cos()
