"""The U-Net of EDM2 (Karras et al. 2024, arXiv 2312.02696), config G, which keeps magnitudes.

Written from the formulas of the paper; names and shapes of its weights are the published ones.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import Key, whole
from models.halvings import Halvings, attention_remarks, cut, padded
from models.layers import Double, Halve, check_whole, one_hot, refuse
from models.magnitude import (
    MPFourier,
    MPLayer,
    mp_cat,
    mp_silu,
    mp_sum,
    normalise_weights,
    unit_magnitude,
)
from op.on_cpu import attention, dropout
from sources.codec import Shape
from sources.images import ImageSize


class Block(nn.Module):
    """A residual block from (B, in, H, W) to (B, out, H, W), or to twice or half the size.

    In the encoder it widens its input first and brings each pixel to magnitude 1; in the decoder it
    also takes a `skip`, and widens last. The embedding (B, emb_channels) scales the channels
    between the convolutions. Attention is by cosines, since queries and keys have magnitude 1.

    Args:
        encodes: a block of the encoder.
        resample: None, `Halve()` or `Double()`.
        heads: of the attention that ends the block; 0: none.
        dropout: share of the activations that is set to zero in training.
        concat_balance, res_balance, attn_balance: shares of the skip, the branch and the attention.
        clip: largest entry of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encodes: bool,
        resample: nn.Module | None = None,
        heads: int = 0,
        dropout: float,
        concat_balance: float,
        res_balance: float,
        attn_balance: float,
        clip: float,
    ):
        super().__init__()
        self.encodes, self.resample, self.heads, self.dropout = encodes, resample, heads, dropout
        self.concat_balance, self.res_balance = concat_balance, res_balance
        self.attn_balance, self.clip = attn_balance, clip
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = MPLayer(out_channels if encodes else in_channels, out_channels, 3)
        self.emb_linear = MPLayer(emb_channels, out_channels)
        self.conv_res1 = MPLayer(out_channels, out_channels, 3)
        self.conv_skip = self.attn_qkv = self.attn_proj = None
        if in_channels != out_channels:
            self.conv_skip = MPLayer(in_channels, out_channels, 1)
        if heads:
            self.attn_qkv = MPLayer(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPLayer(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = mp_cat(x, skip, self.concat_balance)
        if self.resample is not None:
            x = self.resample(x)
        if self.encodes:
            x = unit_magnitude(self._widened(x), 1)
        h = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        h = mp_silu(h * scale[:, :, None, None])
        h = self.conv_res1(dropout(h, self.dropout, self.training))
        if not self.encodes:
            x = self._widened(x)
        x = mp_sum(x, h, self.res_balance)
        if self.heads:
            x = mp_sum(x, self._attention(x), self.attn_balance)
        return x.clip(-self.clip, self.clip)

    def _widened(self, x: Tensor) -> Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)

    def _attention(self, x: Tensor) -> Tensor:
        # a head's channels are its queries, keys and values in turn
        heads = self.attn_qkv(x).flatten(2).unflatten(1, (self.heads, -1, 3))
        heads = unit_magnitude(heads, 2).permute(3, 0, 1, 4, 2).contiguous()
        q, k, v = heads  # (B, heads, HW, C / heads) each
        return self.attn_proj(attention(q, k, v).mT.reshape(x.shape))


class EDM2UNet(nn.Module):
    """From images (B, channels, H, W) and noise labels (B,) to (B, out_channels, H, W).

    In training each call first brings the stored weights to magnitude 1 (`normalise_weights`).

    Args:
        image_size: height and width of the images, one number if they are equal; they decide which
            levels have attention. Images of other sides can be given in a call.
        channels, out_channels: of the image, and of the output.
        nf: channels at the finest level.
        ch_mult: channels of each level, in units of `nf`.
        num_res_blocks: blocks of a level; the decoder has one more.
        attn_resolutions: longer sides of the levels that have attention; so has the middle.
        head_width: channels of a head; narrower features have no attention.
        dropout: share of the activations that is set to zero in training.
        num_classes: number of classes, labelled from 0.
        noise_mult, emb_mult: widths of the noise features and of the embedding, in units of `nf`;
            None: those of the finest and of the widest level.
        label_balance: share of the class in the embedding.
        concat_balance, res_balance, attn_balance, clip: see `Block`.
        checkpoint_activations: keep only the inputs of each block for backward.

    Attributes:
        remarks: lines on configured attention that has no effect in this network, and on padding.

    Raises:
        ValueError: the channels of a level are not whole heads.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        "model.head_width": Key(
            64, whole(1, 4096), "channels of an attention head; levels with fewer have no attention"
        ),
    }
    reads: ClassVar[Mapping[str, str | None]] = dict.fromkeys(
        f"model.{name}"
        for name in (
            *("ch_mult", "num_res_blocks", "attn_resolutions", "dropout"),
            "checkpoint_activations",
        )
    )

    def __init__(
        self,
        *,
        image_size: ImageSize,
        channels: int = 3,
        out_channels: int = 3,
        nf: int = 128,
        ch_mult: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        head_width: int = 64,
        dropout: float = 0.0,
        num_classes: int = 0,
        noise_mult: int | None = None,
        emb_mult: int | None = None,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip: float = 256.0,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        widths = [nf * multiplier for multiplier in ch_mult]
        noise_width = nf * (ch_mult[0] if noise_mult is None else noise_mult)
        emb_width = nf * (max(ch_mult) if emb_mult is None else emb_mult)
        self.image_size, self.num_classes = image_size, num_classes
        self.label_balance = label_balance
        self.checkpoint_activations = checkpoint_activations
        self.halvings = Halvings.of(image_size, len(ch_mult) - 1)
        sizes, factors = [*map(max, self.halvings.sides)], self.halvings.factors
        block = partial(
            Block,
            emb_channels=emb_width,
            dropout=dropout,
            concat_balance=concat_balance,
            res_balance=res_balance,
            attn_balance=attn_balance,
            clip=clip,
        )

        def heads(width: int) -> int:
            if width >= head_width and width % (width // head_width):
                raise ValueError(
                    f"model.head_width={head_width} makes no whole heads of {width} channels: "
                    "change model.nf, model.ch_mult or model.head_width"
                )
            return width // head_width

        # in the order of the published weights
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier = MPFourier(noise_width)
        self.emb_noise = MPLayer(noise_width, emb_width)
        self.emb_label = MPLayer(num_classes, emb_width) if num_classes else None
        self.encoder, skip_widths = nn.ModuleList(), []
        width = channels + 1  # a channel of ones, in place of a bias
        for i, level_width in enumerate(widths):
            if i:
                halve = Halve(factors=factors[i - 1])
                level = {"down": block(width, width, encodes=True, resample=halve)}
            else:
                level, width = {"conv": MPLayer(width, level_width, 3)}, level_width
            skip_widths.append(width)
            attention = heads(level_width) if sizes[i] in attn_resolutions else 0
            for k in range(num_res_blocks):
                level[f"block{k}"] = block(width, level_width, encodes=True, heads=attention)
                width = level_width
                skip_widths.append(width)
            self.encoder.append(nn.ModuleDict(level))
        self.decoder = nn.ModuleList()  # the coarsest level first
        for i, level_width in reversed([*enumerate(widths)]):
            if i == len(widths) - 1:
                level = {
                    "in0": block(width, width, encodes=False, heads=heads(width)),
                    "in1": block(width, width, encodes=False),
                }
            else:
                double = Double(factors=factors[i])
                level = {"up": block(width, width, encodes=False, resample=double)}
            attention = heads(level_width) if sizes[i] in attn_resolutions else 0
            for k in range(num_res_blocks + 1):
                joined = width + skip_widths.pop()
                level[f"block{k}"] = block(joined, level_width, encodes=False, heads=attention)
                width = level_width
            self.decoder.append(nn.ModuleDict(level))
        self.out_conv = MPLayer(width, out_channels, 3)
        narrow = {s for s, width in zip(sizes, widths, strict=True) if width < head_width}
        self.remarks = attention_remarks(
            self.halvings, attn_resolutions, narrow, narrow_middle=widths[-1] < head_width
        ) + self.halvings.remarks(image_size)

    @classmethod
    def from_config(cls, config, shape: Shape, out_channels: int) -> Self:
        """The network that the config describes; raises as the constructor."""
        model = config.model
        check_whole(model, "nf", "ch_mult", "num_res_blocks")
        return cls(
            image_size=shape[1:],
            channels=shape[0],
            out_channels=out_channels,
            nf=model.nf,
            ch_mult=model.ch_mult,
            num_res_blocks=model.num_res_blocks,
            attn_resolutions=model.attn_resolutions,
            head_width=model.head_width,
            dropout=model.dropout,
            num_classes=config.data.num_classes,
            checkpoint_activations=model.checkpoint_activations,
        )

    def embed(self, noise_label: Tensor, classes: Tensor | None) -> Tensor:
        """The embedding (B, width) of noise labels (B,) and one-hot classes (B, num_classes)."""
        emb = self.emb_noise(self.emb_fourier(noise_label))
        if classes is not None:
            of_class = self.emb_label(classes * self.num_classes**0.5)
            emb = mp_sum(emb, of_class, self.label_balance)
        return mp_silu(emb)

    def forward(self, x: Tensor, noise_label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The output (B, out_channels, H, W) at `x` (B, channels, H, W) and `noise_label` (B,).

        Class labels (B,), int64, are -1 for none. ValueError where the network has no classes.
        """
        if self.training:
            normalise_weights(self)
        classes = None
        if self.num_classes:
            classes = one_hot(class_labels, self.num_classes, x)
        else:
            refuse(class_labels=class_labels)
        emb = self.embed(noise_label, classes)

        def run(block: nn.Module, *inputs: Tensor) -> Tensor:
            if self.checkpoint_activations and torch.is_grad_enabled():
                return checkpoint(block, *inputs, use_reentrant=False)
            return block(*inputs)

        margins = self.halvings.margins(x)
        x = padded(x, margins)
        h, skips = torch.cat([x, torch.ones_like(x[:, :1])], 1), []
        for level in self.encoder:
            for label, block in level.items():
                h = block(h) if label == "conv" else run(block, h, emb)
                skips.append(h)
        for level in self.decoder:
            for label, block in level.items():
                inputs = [h, emb, skips.pop()] if label.startswith("block") else [h, emb]
                h = run(block, *inputs)
        return cut(self.out_conv(h, self.out_gain), margins)
