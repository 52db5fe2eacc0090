"""The U-Net of Song et al. (arXiv 2011.13456), appendix H, in all its forms: DDPM, DDPM++, NCSN++.

EDM's networks are it too, with other attention and other blocks (`models.edm`).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.keys import named
from models.halvings import Factors, Halvings, attention_remarks, cut, padded
from models.layers import (
    ACTIVATIONS,
    Attention,
    Double,
    FourierFeatures,
    Halve,
    Norm,
    PositionalFeatures,
    Resampling,
    ResBlock,
    Taps,
    conv,
    dense,
    group_norm,
    one_hot,
    refuse,
    residual_sum,
)
from sources.images import ImageSize

# Words that an option of a U-Net may be, as a key `model.*` too.
CHOICES = {
    "embedding_type": ("fourier", "positional"),
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
}


class Stage(nn.Module):
    """A residual block, and attention after it or None."""

    def __init__(self, block: ResBlock, attention: Attention | None):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, h: Tensor, emb: Tensor | None, skip: Tensor | None = None) -> Tensor:
        h = self.block(h, emb, skip)
        return h if self.attention is None else self.attention(h)


class InputSkip(nn.Module):
    """The image, halved, that joins the features of its size (`progressive_input='input_skip'`)."""

    def __init__(self, image_channels: int, channels: int, resample: Halve, combine: str):
        super().__init__()
        self.resample = resample
        self.conv = conv(image_channels, channels, 1)
        self.combine = combine

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.resample(image)
        joined = self.conv(image)
        return torch.cat([joined, h], 1) if self.combine == "cat" else joined.add_(h), image


class ResidualBranch(nn.ModuleDict):
    """A branch that is resampled and summed with the features at every level.

    With `progressive_input='residual'` it comes from the image and its module is `down`, with
    `progressive='residual'` it leads to the output and its module is `up`.
    """

    def __init__(self, skip_rescale: bool, **resampling: Resampling):
        super().__init__(resampling)
        self.skip_rescale = skip_rescale

    def forward(self, h: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        (resample,) = self.values()
        h = residual_sum(resample(branch), h, self.skip_rescale)
        return h, h


class OutputSkip(nn.Module):
    """An image that doubles and grows with every level (`progressive='output_skip'`).

    `progressive='residual'` has one at the coarsest level, where its branch begins.
    """

    def __init__(self, head: nn.Module, resample: Double):
        super().__init__()
        self.resample, self.head = resample, head

    def forward(self, h: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
        update = self.head(h)
        return h, update if image is None else update.add_(self.resample(image))


class UNet(nn.Module):
    """U-Net from images (B, channels, H, W) and noise labels (B,) to (B, out_channels, H, W).

    Arguments that are not listed are the keys `model.*` of their names (docs/config.md).

    Args:
        image_size: height and width of the images, one number if they are equal; they decide which
            levels have attention. Images of other sides can be given in a call.
        channels, out_channels: of the image, and of the output.
        conditional: embed the label in every block; without it only `scale_by_sigma` reads it.
        resblock_type: 'biggan' resamples inside residual blocks, 'ddpm' between them.
        fir_kernel: taps of the resampling filter, as (1, 3, 3, 1); None for nearest pixel and mean.
        scale_by_sigma: divide the output by the noise level: `sigmas[label]` where the embedding is
            'positional', the label itself where it is 'fourier'.
        sigmas: noise levels (num_scales,) that the labels number.
        centered: `x` is in [-1, 1]; else in [0, 1], and is centred first.
        num_classes: number of classes, labelled from 0.
        condition_channels: channels of the condition "image", which are further input channels.
        norm, attention, block: constructors, such as `group_norm`, `Attention` and `ResBlock`.
        log_label: 'fourier' embeds the log of the label.
        stem_width: channels of the first convolution, None for `nf`.
        attend_throughout: in the decoder, attention follows every block, not only a level's last.
        checkpoint_activations: keep only the inputs of each block, its attention included, for
            backward, which runs it again: less memory for a third more time (arXiv 1604.06174).

    Attributes:
        remarks: lines on configured attention that has no effect in this network, and on padding.

    Raises:
        ValueError: an option's value is unknown.
    """

    def __init__(
        self,
        *,
        image_size: ImageSize,
        channels: int = 3,
        out_channels: int = 3,
        nf: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        embedding_type: str = "positional",
        conditional: bool = True,
        resblock_type: str = "biggan",
        resamp_with_conv: bool = True,
        fir_kernel: Taps = None,
        progressive: str = "none",
        progressive_input: str = "none",
        progressive_combine: str = "sum",
        nonlinearity: str = "swish",
        dropout: float = 0.0,
        init_scale: float = 0.0,
        skip_rescale: bool = True,
        fourier_scale: float = 16.0,
        scale_by_sigma: bool = False,
        sigmas: Tensor | None = None,
        centered: bool = True,
        num_classes: int = 0,
        condition_channels: int = 0,
        augment_dim: int = 0,
        norm: Norm = group_norm,
        attention: Callable[..., nn.Module] = Attention,
        block: Callable[..., nn.Module] = ResBlock,
        log_label: bool = True,
        stem_width: int | None = None,
        attend_throughout: bool = False,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        _check_choice("embedding_type", embedding_type)
        _check_choice("resblock_type", resblock_type)
        _check_choice("progressive", progressive)
        _check_choice("progressive_input", progressive_input)
        _check_choice("progressive_combine", progressive_combine)
        act = named(ACTIVATIONS, "model.nonlinearity", nonlinearity)
        if (num_classes or augment_dim) and not conditional:
            raise ValueError("data.num_classes and model.augment_dim need model.conditional = True")
        if num_classes < 0 or augment_dim < 0:
            raise ValueError("data.num_classes and model.augment_dim must not be negative")
        self.act, self.centered, self.scale_by_sigma = act, centered, scale_by_sigma
        self.image_size, self.num_classes = image_size, num_classes
        self.condition_channels, channels = condition_channels, channels + condition_channels
        self.checkpoint_activations = checkpoint_activations
        self.halvings = Halvings.of(image_size, len(ch_mult) - 1)
        positional = embedding_type == "positional"
        sigmas = sigmas.float() if positional and scale_by_sigma else None
        self.register_buffer("sigmas", sigmas, persistent=False)

        shared = {"init_scale": init_scale, "skip_rescale": skip_rescale, "norm": norm}
        attention = partial(attention, **shared)
        block = partial(
            block,
            **shared,
            emb_channels=4 * nf,
            act=act,
            dropout=dropout,
            nin_shortcut=resblock_type == "ddpm",
        )

        def head(in_channels: int, out_channels: int, *, init_scale: float) -> nn.Sequential:
            layer = conv(in_channels, out_channels, init_scale=init_scale)
            return nn.Sequential(OrderedDict(norm=norm(in_channels), act=act, conv=layer))

        def stage(in_channels: int, out_channels: int, *, attend: bool) -> Stage:
            resnet = block(in_channels, out_channels)
            return Stage(resnet, attention(out_channels) if attend else None)

        def resampled(width: int, factors: Factors, *, up: bool) -> nn.Module:
            if resblock_type == "biggan":
                return block(width, width, resample=(Double if up else Halve)(fir_kernel, factors))
            options = {"with_conv": resamp_with_conv, "fir_kernel": fir_kernel, "factors": factors}
            return Resampling(width, width, up=up, **options)

        # The modules are made in the order of the diagram, which is that of the published weights.
        self.features = PositionalFeatures(nf)
        if not positional:
            self.features = FourierFeatures(nf, fourier_scale, log=log_label)
        self.label_embedding = self.augment_embedding = self.dense1 = self.dense2 = None
        width = nf if positional else 2 * nf
        if num_classes:
            self.label_embedding = dense(num_classes, width)
        if augment_dim:
            self.augment_embedding = dense(augment_dim, width, bias=False)
        if conditional:
            self.dense1 = dense(width, 4 * nf)
            self.dense2 = dense(4 * nf, 4 * nf)
        width = nf if stem_width is None else stem_width
        self.stem = conv(channels, width)

        sizes, factors = [*map(max, self.halvings.sides)], self.halvings.factors
        levels = [(nf * m, s in attn_resolutions) for m, s in zip(ch_mult, sizes, strict=True)]
        coarsest = len(levels) - 1

        # None where a level lacks a part: the coarsest has no `down`, the finest no `up`.
        self.encoder = nn.ModuleList()
        branch_width, skip_widths = channels, [width]
        for i, (level_width, attend) in enumerate(levels):
            stages = []
            for _ in range(num_res_blocks):
                stages.append(stage(width, level_width, attend=attend))
                width = level_width
                skip_widths.append(width)
            down = join = None
            if i < coarsest:
                down = resampled(width, factors[i], up=False)
                if progressive_input == "input_skip":
                    halve = Halve(fir_kernel, factors[i])
                    join = InputSkip(channels, width, halve, progressive_combine)
                    width *= 2 if progressive_combine == "cat" else 1
                elif progressive_input == "residual":
                    options = {"fir_kernel": fir_kernel, "factors": factors[i]}
                    branch = Resampling(branch_width, width, up=False, **options)
                    join = ResidualBranch(skip_rescale, down=branch)
                    branch_width = width
                skip_widths.append(width)
            parts = {"stages": nn.ModuleList(stages), "down": down, "progressive_input": join}
            self.encoder.append(nn.ModuleDict(parts))

        self.middle1 = block(width, width)
        self.middle_attention = attention(width)
        self.middle2 = block(width, width)

        self.decoder = nn.ModuleList()
        for i, (level_width, attend) in reversed(list(enumerate(levels))):
            stages = []
            for k in range(num_res_blocks + 1):
                attend_now = attend and (attend_throughout or k == num_res_blocks)
                stages.append(stage(width + skip_widths.pop(), level_width, attend=attend_now))
                width = level_width
            grow = None
            options = {"fir_kernel": fir_kernel, "factors": factors[i] if i < coarsest else (1, 1)}
            if progressive == "output_skip":
                update = head(width, out_channels, init_scale=init_scale)
                grow = OutputSkip(update, Double(**options))
            elif progressive == "residual" and i == coarsest:
                grow = OutputSkip(head(width, width, init_scale=1.0), Double(**options))
            elif progressive == "residual":
                branch = Resampling(branch_width, width, up=True, **options)
                grow = ResidualBranch(skip_rescale, up=branch)
            branch_width = width
            up = resampled(width, factors[i - 1], up=True) if i > 0 else None
            parts = {"stages": nn.ModuleList(stages), "progressive": grow, "up": up}
            self.decoder.append(nn.ModuleDict(parts))

        self.head = None
        if progressive != "output_skip":
            self.head = head(width, out_channels, init_scale=init_scale)
        heads = [level["stages"][0].attention for level in self.encoder]  # Identity: too narrow
        narrow = {s for s, head in zip(sizes, heads, strict=True) if isinstance(head, nn.Identity)}
        self.remarks = attention_remarks(
            self.halvings,
            attn_resolutions,
            narrow,
            narrow_middle=isinstance(self.middle_attention, nn.Identity),
        ) + self.halvings.remarks(image_size)

    def embed(
        self, features: Tensor, classes: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """The embedding (B, 4 nf) of noise `features`, one-hot classes and augmentation labels."""
        if classes is not None:
            features = features + self.label_embedding(classes * math.sqrt(self.num_classes))
        if augment_labels is not None:
            features = features + self.augment_embedding(augment_labels.to(features))
        return self.dense2(self.act(self.dense1(features)))

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """The output (B, out_channels, H, W) at `x` (B, channels, H, W) and `noise_label` (B,).

        Class labels (B,), int64, are -1 for none, augmentation labels (B, augment_dim) 0, and a
        condition `image` (B, condition_channels, H, W) 0; each may be None. ValueError for those
        that the network was made without.
        """
        classes = emb = None  # the embedding is activated, as all blocks take it
        if self.num_classes:
            classes = one_hot(class_labels, self.num_classes, x)
        else:
            refuse(class_labels=class_labels)
        if self.augment_embedding is None:
            refuse(augment_labels=augment_labels)
        elif augment_labels is None:  # the embedding is used all the same, as DDP wants it
            augment_labels = x.new_zeros(len(x), self.augment_embedding.in_features)
        if self.dense1 is not None:
            features = self.features(noise_label).to(x.dtype)
            emb = self.act(self.embed(features, classes, augment_labels))
        if not self.centered:
            x = 2 * x - 1
        if not self.condition_channels:
            refuse(image=image)
        else:
            none = x.new_zeros(len(x), self.condition_channels, *x.shape[2:])
            x = torch.cat([x, none if image is None else image.to(x)], 1)
        margins = self.halvings.margins(x)
        x = padded(x, margins)

        def run(block: nn.Module, *inputs: Tensor | None) -> Tensor:
            if self.checkpoint_activations and torch.is_grad_enabled():
                return checkpoint(block, *inputs, use_reentrant=False)
            return block(*inputs)

        h = self.stem(x)
        skips, pyramid = [h], x
        for level in self.encoder:
            for stage in level["stages"]:
                h = run(stage, h, emb)
                skips.append(h)
            if level["down"] is not None:
                h = run(level["down"], h, emb)
                if level["progressive_input"] is not None:
                    h, pyramid = level["progressive_input"](h, pyramid)
                skips.append(h)

        h = run(self.middle_attention, run(self.middle1, h, emb))
        h = run(self.middle2, h, emb)

        pyramid = None
        for level in self.decoder:
            for stage in level["stages"]:
                h = run(stage, h, emb, skips.pop())
            if level["progressive"] is not None:
                h, pyramid = level["progressive"](h, pyramid)
            if level["up"] is not None:
                h = run(level["up"], h, emb)
        out = cut(pyramid if self.head is None else self.head(h), margins)

        if self.scale_by_sigma:
            sigma = noise_label if self.sigmas is None else self.sigmas[noise_label.long()]
            out = out / sigma.to(out.dtype)[:, None, None, None]
        return out


def _check_choice(option: str, value: str) -> None:
    if value not in CHOICES[option]:
        choices = ", ".join(map(repr, CHOICES[option]))
        raise ValueError(f"model.{option} must be one of {choices}, not {value!r}")
