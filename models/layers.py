"""Building blocks of the U-Nets: noise embeddings, resampling, residual and attention blocks.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), and Song et al.,
"Score-Based Generative Modeling through SDEs" (arXiv 2011.13456), appendix H.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor, nn

from models.halvings import Factors
from op.on_cpu import attention, conv_of_repeated, dropout
from op.upfirdn import Pass, filtered

Taps = Sequence[float] | None  # of a resampling filter
Norm = Callable[[int], nn.Module]  # made for a number of channels

ACTIVATIONS = {"elu": nn.ELU(), "lrelu": nn.LeakyReLU(0.2), "relu": nn.ReLU(), "swish": nn.SiLU()}


def check_whole(model: ConfigDict, *options: str) -> None:
    """Raise ValueError unless these options are whole numbers of at least 1, `ch_mult` several."""
    for option in options:
        values = model[option] if option == "ch_mult" else (model[option],)
        if not values or not all(isinstance(value, int) and value >= 1 for value in values):
            raise ValueError(
                f"model.{option} must be whole numbers of at least 1, not "
                f"{', '.join(map(repr, values)) or 'nothing'}"
            )


def geometric_sigmas(sigma_max: float | None, sigma_min: float, num_scales: int) -> Tensor:
    """Noise levels (num_scales,) from `sigma_max` down to `sigma_min`, evenly spaced in the log.

    ValueError where `sigma_max` is None.
    """
    if sigma_max is None:
        raise ValueError("model.sigma_max is open: training measures it at its first start")
    return torch.linspace(
        math.log(sigma_max), math.log(sigma_min), num_scales, dtype=torch.float64
    ).exp()


def scaled_init(weight: Tensor, scale: float = 1.0) -> None:
    """Draw `weight` uniformly, of variance scale / mean(fan_in, fan_out); 0 means almost 0."""
    nn.init.xavier_uniform_(weight, gain=math.sqrt(max(scale, 1e-10)))


def dense(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer, its weights drawn by `scaled_init` and its biases 0."""
    layer = nn.Linear(in_features, out_features, bias)
    scaled_init(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def conv(
    in_channels: int, out_channels: int, size: int = 3, *, init_scale: float = 1.0, **options
) -> nn.Conv2d:
    """A convolution, its weights drawn by `scaled_init`, its biases 0; by default it is padded."""
    options = {"padding": size // 2} | options
    layer = nn.Conv2d(in_channels, out_channels, size, **options)
    scaled_init(layer.weight, init_scale)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, *, group_width: int = 4, eps: float = 1e-6) -> nn.GroupNorm:
    """A norm of at most 32 groups of at least `group_width` channels each, as many as possible."""
    most = max(1, min(channels // group_width, 32))
    groups = next(n for n in range(most, 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


def residual_sum(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """`x + h`; with `rescale` divided by sqrt(2), which keeps the variance of the summands."""
    total = x + h
    return total.mul_(math.sqrt(0.5)) if rescale else total


def refuse(**conditions: Tensor | None) -> None:
    """Raise ValueError for conditions other than None, which the network does not take."""
    keys = {"class_labels": "data.num_classes", "augment_labels": "model.augment_dim"}
    keys["image"] = "data.condition_channels"
    for name, value in conditions.items():
        if value is not None:
            raise ValueError(
                f"the network takes no {name}: give None, or make it with {keys[name]}"
            )


def one_hot(class_labels: Tensor | None, num_classes: int, rows: Tensor) -> Tensor:
    """One-hot vectors (B, num_classes) of labels (B,), int64, of the dtype and device of `rows`.

    They are 0 for the label -1, and for all B rows where `class_labels` is None.
    """
    if class_labels is None:
        return rows.new_zeros(len(rows), num_classes)
    return F.one_hot(class_labels + 1, num_classes + 1)[:, 1:].to(rows)


class FourierFeatures(nn.Module):
    """Random Fourier features (B, 2 * size) of noise labels (B,) or, with `log`, of their logs.

    With `log` the labels must be positive.
    """

    def __init__(self, size: int, scale: float, *, log: bool = True):
        super().__init__()
        self.W = nn.Parameter(torch.randn(size) * scale, requires_grad=False)
        self.log = log

    def forward(self, noise_label: Tensor) -> Tensor:
        angles = 2 * math.pi * torch.outer(noise_label.log() if self.log else noise_label, self.W)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class PositionalFeatures(nn.Module):
    """Sines and cosines (B, size) of labels (B,) up to 10^4: the positions of a transformer.

    Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.5. The smallest
    frequency is 10^-4. With `endpoint=False`, as in ADM, the series of frequencies has one more,
    the last of which is left out, and cosines come first.
    """

    def __init__(self, size: int, *, endpoint: bool = True):
        super().__init__()
        self.size, self.endpoint = size, endpoint

    def forward(self, noise_label: Tensor) -> Tensor:
        dtype = torch.promote_types(noise_label.dtype, torch.float32)  # half is too coarse
        label = noise_label.to(dtype)
        n = self.size // 2
        last = -4 if self.endpoint else -4 + 4 / n
        angles = torch.outer(label, torch.logspace(0, last, n, dtype=dtype, device=label.device))
        waves = (angles.sin(), angles.cos()) if self.endpoint else (angles.cos(), angles.sin())
        return F.pad(torch.cat(waves, dim=1), (0, self.size % 2))


class _Filter(nn.Module):
    """Resampling by `factors`, with a filter of taps `fir_kernel` along axes of factor 2."""

    grows: ClassVar[bool]

    def __init__(self, fir_kernel: Taps = None, factors: Factors = (2, 2)):
        super().__init__()
        self.factors, kernel = factors, None
        if fir_kernel is not None:
            if abs(math.fsum(fir_kernel)) < 1e-6:
                raise ValueError(f"the taps of model.fir_kernel={fir_kernel} must not sum to 0")
            self.taps = len(fir_kernel)
            taps = [fir_kernel if factor == 2 else (1.0,) for factor in factors]
            vertical, horizontal = (torch.tensor(each, dtype=torch.float32) for each in taps)
            gain = math.prod(factors) if self.grows else 1
            scale = gain / (vertical.sum() * horizontal.sum())
            kernel = torch.outer(vertical, horizontal) * scale
        self.register_buffer("kernel", kernel, persistent=False)

    def pads(self, halved: tuple[int, int], whole: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
        """Padding (top, bottom, left, right): `halved` of axes of factor 2, `whole` of others."""
        return tuple(n for factor in self.factors for n in (halved if factor == 2 else whole))


class Double(_Filter):
    """Images of twice the size, by the filter of `fir_kernel` or, for None, by repeating pixels."""

    grows = True

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return F.interpolate(x, scale_factor=self.factors)
        pads = self.pads(((self.taps + 1) // 2, self.taps // 2 - 1))
        return filtered(x, Pass(self.kernel, self.factors, (1, 1), pads))

    def convolved(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """`layer`, a 3x3 convolution, of the images of twice the size."""
        repeats = self.kernel is None
        return conv_of_repeated(x, layer, self.factors) if repeats else layer(self(x))


class Halve(_Filter):
    """Images of half the size, by the filter of `fir_kernel` or, for None, by 2x2 means."""

    grows = False

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return F.avg_pool2d(x, self.factors)
        pads = self.pads(((self.taps - 1) // 2, self.taps // 2 - 1))
        return filtered(x, Pass(self.kernel, (1, 1), self.factors, pads))


class Resampling(nn.Module):
    """From (B, in, H, W) to twice (`up`) or half the size, with a 3x3 convolution if `with_conv`.

    It is called like a residual block, and does not use the embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        up: bool,
        with_conv: bool = True,
        fir_kernel: Taps = None,
        factors: Factors = (2, 2),
    ):
        super().__init__()
        self.resample = (Double if up else Halve)(fir_kernel, factors)
        options = {} if up else {"stride": factors, "padding": 0}
        layer = conv(in_channels, out_channels, **options) if with_conv else None
        self.conv, self.fir_conv = (layer, None) if fir_kernel is None else (None, layer)
        self.up = up

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        resample = self.resample
        if self.conv is not None:
            if self.up:
                return resample.convolved(x, self.conv)
            top, bottom, left, right = resample.pads((0, 1), (1, 1))
            return self.conv(F.pad(x, (left, right, top, bottom)))
        if self.fir_conv is None:
            return resample(x)
        n, same = resample.taps, (1, 1)
        if not self.up:
            pads = resample.pads(((n + 1) // 2, n // 2), (1, 1))
            return self.fir_conv(filtered(x, Pass(resample.kernel, same, same, pads)))
        # Zeros between the pixels and the 3x3 convolution are one transposed convolution; the
        # filter comes last, so that the border is padded once (Karras et al., StyleGAN2).
        weight = self.fir_conv.weight.transpose(0, 1).flip(2, 3)
        h = F.conv_transpose2d(x, weight, stride=resample.factors)
        pads = resample.pads(((n - 1) // 2, n // 2 - 1), (-1, -1))
        h = filtered(h, Pass(resample.kernel, same, same, pads))
        return h + self.fir_conv.bias[:, None, None]


class NIN(nn.Module):
    """A 1x1 convolution (B, in, H, W) to (B, out, H, W), its matrix `W` (in, out)."""

    def __init__(self, in_channels: int, out_channels: int, *, init_scale: float = 0.1):
        super().__init__()
        self.W = nn.Parameter(torch.empty(in_channels, out_channels))
        self.b = nn.Parameter(torch.zeros(out_channels))
        scaled_init(self.W, init_scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W.t()[:, :, None, None], self.b)

    def tokens(self, x: Tensor) -> Tensor:
        """The result (B, N, out) for pixels in rows (B, N, in)."""
        return F.linear(x, self.W.t(), self.b)


class Attention(nn.Module):
    """Self-attention of one head among the pixels of (B, C, H, W), added to its input."""

    def __init__(
        self, channels: int, *, init_scale: float, skip_rescale: bool, norm: Norm = group_norm
    ):
        super().__init__()
        self.norm = norm(channels)
        self.query = NIN(channels, channels)
        self.key = NIN(channels, channels)
        self.value = NIN(channels, channels)
        self.out = NIN(channels, channels, init_scale=init_scale)
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, HW, C)
        q, k, v = (m.tokens(pixels)[:, None] for m in (self.query, self.key, self.value))
        h = attention(q, k, v)[:, 0]
        h = self.out.tokens(h).transpose(1, 2).unflatten(2, x.shape[2:])
        return residual_sum(x, h, self.skip_rescale)


class MultiHeadAttention(nn.Module):
    """`Attention` with EDM's and ADM's weights: one convolution gives queries, keys and values.

    It has heads of `head_width` channels, at least one, or a single head where that is None.
    """

    def __init__(
        self,
        channels: int,
        *,
        init_scale: float,
        skip_rescale: bool,
        head_width: int | None = None,
        norm: Norm = group_norm,
    ):
        super().__init__()
        self.heads = 1 if head_width is None else channels // head_width
        self.norm = norm(channels)
        self.qkv = conv(channels, 3 * channels, 1, init_scale=0.2)  # the variance of three `NIN`
        self.proj = conv(channels, channels, 1, init_scale=init_scale)
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor) -> Tensor:
        # A head's channels are its queries, keys and values in turn.
        heads = self.qkv(self.norm(x)).flatten(2).unflatten(1, (self.heads, -1, 3))
        q, k, v = heads.permute(3, 0, 1, 4, 2).contiguous()  # (B, heads, HW, C / heads) each
        h = attention(q, k, v).mT.reshape(x.shape)
        return residual_sum(x, self.proj(h), self.skip_rescale)


class ResBlock(nn.Module):
    """Residual block from (B, in, H, W) to (B, out, H, W), or to twice or half the resolution.

    With `nin_shortcut` and without resampling it is the block of DDPM, else that of BigGAN (Brock
    et al., arXiv 1809.11096), which resamples both of its branches. It is called with `x`; `emb`
    (B, emb_channels), the activated noise embedding, which is added between the convolutions or,
    with `adaptive_scale`, gives a scale and a shift after the norm there (as in ADM); and `skip`,
    which makes up the `in` channels together with `x`.

    Args:
        emb_channels: width of the embedding. Every block has its layer, as in published networks,
            also where the network is not conditional and calls the block without one.
        resample: None, `Double(...)` or `Halve(...)`.
        skip_rescale: divide the sum by sqrt(2).
        nin_shortcut: the shortcut's 1x1 convolution is a `NIN`, else a `Conv2d`.
        resample_conv: a shortcut that resamples has a convolution even where `in` is `out`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        act: nn.Module,
        dropout: float,
        init_scale: float,
        skip_rescale: bool,
        nin_shortcut: bool = False,
        resample: nn.Module | None = None,
        resample_conv: bool = True,
        adaptive_scale: bool = False,
        norm: Norm = group_norm,
    ):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels)
        self.dense = dense(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, init_scale=init_scale)
        self.conv_shortcut = self.nin_shortcut = None
        if nin_shortcut and in_channels != out_channels:
            self.nin_shortcut = NIN(in_channels, out_channels)
        elif in_channels != out_channels or (resample is not None and resample_conv):
            self.conv_shortcut = conv(in_channels, out_channels, 1)
        self.resample, self.adaptive_scale = resample, adaptive_scale
        self.act, self.dropout, self.skip_rescale = act, dropout, skip_rescale

    def forward(self, x: Tensor, emb: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        h = self.act(self.norm1(x))
        if isinstance(self.resample, Double):
            h, x = self.resample.convolved(h, self.conv1), self.resample(x)
        elif self.resample is not None:
            h, x = self.conv1(self.resample(h)), self.resample(x)
        else:
            h = self.conv1(h)
        shift = None if emb is None else self.dense(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = shift.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), scale + 1)
        else:
            h = self.norm2(h if shift is None else h.add_(shift))
        h = self.conv2(dropout(self.act(h), self.dropout, self.training))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        elif self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return residual_sum(x, h, self.skip_rescale)
