"""NCSN++ and DDPM++: the U-Net of Song et al. (arXiv 2011.13456), appendix H, with its options."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.keys import get
from configs.schema import SHARE, Flag, Key, Number, Numbers, OneOf, whole
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
    check_size,
    check_whole,
    conv,
    dense,
    geometric_sigmas,
    group_norm,
    one_hot,
    one_of,
    refuse,
    residual_sum,
)
from sources.codec import Shape


class Stage(nn.Module):
    """A residual block, and attention after it where there is one."""

    def __init__(self, block: ResBlock, attention: Attention | None):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, h: Tensor, emb: Tensor | None, skip: Tensor | None = None) -> Tensor:
        h = self.block(h, emb, skip)
        return h if self.attention is None else self.attention(h)


class InputSkip(nn.Module):
    """`progressive_input='input_skip'`: the image, halved, joins the features of its size."""

    def __init__(self, image_channels: int, channels: int, fir_kernel: Taps, combine: str):
        super().__init__()
        self.resample = Halve(fir_kernel)
        self.conv = conv(image_channels, channels, 1)
        self.combine = combine

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.resample(image)
        joined = self.conv(image)
        return torch.cat([joined, h], 1) if self.combine == "cat" else joined.add_(h), image


class ResidualBranch(nn.ModuleDict):
    """`progressive_input='residual'` or `progressive='residual'`: a branch from the image, `down`,
    or to the output, `up`, is summed with the features."""

    def __init__(self, skip_rescale: bool, **resampling: Resampling):
        super().__init__(resampling)
        self.skip_rescale = skip_rescale

    def forward(self, h: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        (resample,) = self.values()
        h = residual_sum(resample(branch), h, self.skip_rescale)
        return h, h


class OutputSkip(nn.Module):
    """`progressive='output_skip'`: every level adds to an image that doubles with each.

    `progressive='residual'` has one at the coarsest level, where its branch begins.
    """

    def __init__(self, head: nn.Module, resample: Double):
        super().__init__()
        self.resample, self.head = resample, head

    def forward(self, h: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
        update = self.head(h)
        return h, update if image is None else update.add_(self.resample(image))


# Keys of all U-Nets of this file; keys that DDPM reads too; keys of NCSN++ and DDPM++ only.
UNET = {
    "model.ch_mult": Key(
        (1, 2, 2, 2),
        Numbers(whole(1, 64), range(1, 17)),
        "channels of each level, in units of nf; a level halves the image",
    ),
    "model.num_res_blocks": Key(4, whole(1, 256), "per level"),
    "model.attn_resolutions": Key(
        (16,), Numbers(whole(0), range(17)), "attention where the image is this wide"
    ),
    "model.dropout": Key(0.1, SHARE, "share of the activations that is set to zero in training"),
    "model.augment_dim": Key(
        0, whole(0, 4096), "entries of the augmentation labels the network is given; 0: none"
    ),
    "model.checkpoint_activations": Key(
        False, Flag(), "less memory, a third more time; for 256 px and more"
    ),
    "model.scale_by_sigma": Key(False, Flag(), "VE SDE: divide the output by the noise level"),
}
CONV = {
    "model.resamp_with_conv": Key(True, Flag(), "a convolution before or after resampling"),
    "model.conditional": Key(True, Flag(), "the network sees its noise level or time"),
}
OPTIONS = {
    "model.embedding_type": Key(
        "fourier", OneOf(("fourier", "positional")), "of the noise level or time"
    ),
    "model.fourier_scale": Key(
        16.0, Number(0, 10**4), "standard deviation of the 'fourier' embedding's frequencies"
    ),
    "model.resblock_type": Key("biggan", OneOf(("biggan", "ddpm")), "where blocks resample"),
    "model.fir": Key(True, Flag(), "resample with the filter fir_kernel"),
    "model.fir_kernel": Key(
        (1, 3, 3, 1),
        Numbers(Number(-1000, 1000), range(1, 17)),
        "its taps, up to a factor: their sum must not be 0",
    ),
    "model.skip_rescale": Key(True, Flag(), "sums of two branches are divided by sqrt(2)"),
    "model.progressive": Key(
        "none",
        OneOf(("none", "output_skip", "residual")),
        "how every level on the way up adds to the output; 'none': only the last does",
    ),
    "model.progressive_input": Key(
        "none",
        OneOf(("none", "input_skip", "residual")),
        "how every level on the way down sees the input; 'none': only the first does",
    ),
    "model.progressive_combine": Key(
        "sum", OneOf(("sum", "cat")), "how 'input_skip' joins the input to the features"
    ),
    "model.init_scale": Key(
        0.0, Number(0, 10**6), "of the weights that end a branch; 0 stands for 1e-10"
    ),
}


# Keys of a method that a network with numbered noise levels reads.
LEVELS = ("model.sigma_min", "model.sigma_max", "model.num_scales")


def _argument(value: Any) -> Any:
    """A config's value as an argument of a network: words in lower case, sequences as tuples."""
    if isinstance(value, str):
        return value.lower()
    return tuple(value) if isinstance(value, list) else value


class NCSNpp(nn.Module):
    """U-Net from images (B, channels, H, W) and noise labels (B,) to (B, out_channels, H, W).

    Args:
        image_size: height and width of the images; decides which levels have attention.
        channels, out_channels: of the image, and of the output.
        nf: channels at the first level; level i has `nf * ch_mult[i]` at `image_size / 2^i`.
        num_res_blocks: residual blocks for each level of the encoder (one more in the decoder).
        attn_resolutions: image sizes at which attention follows the blocks.
        embedding_type: of the noise label, 'fourier' or 'positional'.
        conditional: embed the label in every block; without it only `scale_by_sigma` reads it.
        resblock_type: 'biggan' resamples inside residual blocks, 'ddpm' between them.
        resamp_with_conv: the resampling of 'ddpm' has a convolution.
        fir_kernel: taps of the resampling filter, as (1, 3, 3, 1); None for nearest pixel and mean.
        num_classes: number of classes, labelled from 0.
        augment_dim: entries of the augmentation labels.
        progressive: how the output grows: 'none', 'output_skip', 'residual'.
        progressive_input: how the image is fed again: 'none', 'input_skip', 'residual'.
        progressive_combine: of 'input_skip', 'sum' or 'cat'.
        nonlinearity: 'elu', 'lrelu', 'relu' or 'swish'.
        dropout: probability, before the last convolution of each residual block.
        init_scale: initial variance scale of the last layer of each branch, 0 for almost 0.
        skip_rescale: divide residual sums by sqrt(2).
        fourier_scale: standard deviation of the Fourier frequencies.
        scale_by_sigma: divide the output by the noise level: `sigmas[label]` where the embedding is
            'positional', the label itself where it is 'fourier'.
        sigmas: noise levels (num_scales,) that the labels number.
        centered: `x` is in [-1, 1]; else in [0, 1], and is centred first.
        norm, attention, block: constructors, such as `group_norm`, `Attention` and `ResBlock`.
        log_label: 'fourier' embeds the log of the label.
        stem_width: channels of the first convolution, None for `nf`.
        attend_throughout: in the decoder, attention follows every block, not only a level's last.
        checkpoint_activations: keep only the inputs of each block, its attention included, for
            backward, which runs it again: less memory for a third more time (arXiv 1604.06174).

    Attributes:
        keys: the keys that the network declares, for `configs.default`.
        reads: keys that others declare and it reads too: always, or where another key is set.
        options: {argument: the key that it is read from}.
        fixed: arguments that the config does not decide.
        remarks: lines on configured attention that has no effect in this network.

    Raises:
        ValueError: an option's value is unknown, or the levels do not divide the image size.
    """

    keys: ClassVar[Mapping[str, Key]] = UNET | CONV | OPTIONS
    reads: ClassVar[Mapping[str, str | None]] = {
        "data.centered": None,
        "training.continuous": None,
        **dict.fromkeys(LEVELS, "model.scale_by_sigma"),
    }
    options: ClassVar[Mapping[str, str]] = {
        key.partition(".")[2]: key
        for key in ("data.num_classes", "data.centered", "model.nf", "model.nonlinearity", *keys)
        if key not in ("model.fir", "model.fir_kernel")
    }
    fixed: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_config(cls, config, shape: Shape, out_channels: int) -> Self:
        """The network that the config describes, except for the arguments in `fixed`."""
        model = config.model
        check_whole(model, "nf", "num_scales", "ch_mult", "num_res_blocks")
        options = {
            **{name: _argument(get(config, key)) for name, key in cls.options.items()},
            "image_size": shape[1],
            "channels": shape[0],
            "out_channels": out_channels,
            "sigmas": geometric_sigmas(model.sigma_max, model.sigma_min, model.num_scales),
            "fir_kernel": tuple(model.fir_kernel) if model.fir else None,
            **cls.fixed,
        }
        if options["embedding_type"] == "fourier" and not config.training.continuous:
            raise ValueError(
                "model.embedding_type = 'fourier' takes noise levels, but with "
                "training.continuous = False the levels are numbered from 0; use 'positional'"
            )
        return cls(**options)

    def __init__(
        self,
        *,
        image_size: int,
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
        one_of("embedding_type", embedding_type, ("fourier", "positional"))
        one_of("resblock_type", resblock_type, ("biggan", "ddpm"))
        one_of("progressive", progressive, ("none", "output_skip", "residual"))
        one_of("progressive_input", progressive_input, ("none", "input_skip", "residual"))
        one_of("progressive_combine", progressive_combine, ("cat", "sum"))
        act = ACTIVATIONS[one_of("nonlinearity", nonlinearity, ACTIVATIONS)]

        if (num_classes or augment_dim) and not conditional:
            raise ValueError("data.num_classes and model.augment_dim need model.conditional = True")
        if num_classes < 0 or augment_dim < 0:
            raise ValueError("data.num_classes and model.augment_dim must not be negative")
        self.act, self.centered, self.scale_by_sigma = act, centered, scale_by_sigma
        self.image_size, self.num_classes = image_size, num_classes
        self.checkpoint_activations = checkpoint_activations
        self.halvings = len(ch_mult) - 1
        check_size(image_size, image_size, halvings=self.halvings)
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

        def resampled(width: int, *, up: bool) -> nn.Module:
            if resblock_type == "biggan":
                return block(width, width, resample=(Double if up else Halve)(fir_kernel))
            options = {"with_conv": resamp_with_conv, "fir_kernel": fir_kernel}
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

        sizes = [image_size // 2**i for i in range(len(ch_mult))]
        levels = [(nf * m, s in attn_resolutions) for m, s in zip(ch_mult, sizes, strict=True)]
        coarsest = len(levels) - 1

        # What a level does not have is None: the coarsest has no `down`, the finest no `up`.
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
                down = resampled(width, up=False)
                if progressive_input == "input_skip":
                    join = InputSkip(channels, width, fir_kernel, progressive_combine)
                    width *= 2 if progressive_combine == "cat" else 1
                elif progressive_input == "residual":
                    branch = Resampling(branch_width, width, up=False, fir_kernel=fir_kernel)
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
            if progressive == "output_skip":
                update = head(width, out_channels, init_scale=init_scale)
                grow = OutputSkip(update, Double(fir_kernel))
            elif progressive == "residual" and i == coarsest:
                grow = OutputSkip(head(width, width, init_scale=1.0), Double(fir_kernel))
            elif progressive == "residual":
                branch = Resampling(branch_width, width, up=True, fir_kernel=fir_kernel)
                grow = ResidualBranch(skip_rescale, up=branch)
            branch_width = width
            up = resampled(width, up=True) if i > 0 else None
            parts = {"stages": nn.ModuleList(stages), "progressive": grow, "up": up}
            self.decoder.append(nn.ModuleDict(parts))

        self.head = None
        if progressive != "output_skip":
            self.head = head(width, out_channels, init_scale=init_scale)
        self.remarks = self._remarks(sizes, attn_resolutions)

    def _remarks(self, sizes: list[int], attn_resolutions: Sequence[int]) -> list[str]:
        """Lines on configured attention that the network lacks; `sizes` are those of its levels."""

        def attends(module: nn.Module | None) -> bool:
            return not isinstance(module, nn.Identity | None)

        firsts = [level["stages"][0].attention for level in self.encoder]
        there = {size: attends(first) for size, first in zip(sizes, firsts, strict=True)}
        absent = [size for size in attn_resolutions if size and size not in there]
        narrow = [size for size in attn_resolutions if not there.get(size, True)]
        rest = "" if attends(self.middle_attention) else ", nor in the middle"
        return [
            f"model.attn_resolutions: there is no attention at {', '.join(map(str, places))}{why}"
            for places, why in (
                (absent, f": the levels of the network are {', '.join(map(str, sizes))} wide"),
                (narrow, f"{rest}: too few channels for a head (model.nf, model.ch_mult)"),
            )
            if places
        ]

    def embed(
        self, features: Tensor, classes: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """The embedding (B, 4 nf) of features of the noise label and of what else is given."""
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
    ) -> Tensor:
        """Class labels (B,), int64, are -1 for none, augmentation labels (B, augment_dim) 0; either
        may be None. ValueError where they are given and the network was made without."""
        check_size(*x.shape[2:], halvings=self.halvings)
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
        out = pyramid if self.head is None else self.head(h)

        if self.scale_by_sigma:
            sigma = noise_label if self.sigmas is None else self.sigmas[noise_label.long()]
            out = out / sigma.to(out.dtype)[:, None, None, None]
        return out


class DDPM(NCSNpp):
    """The U-Net of Ho et al. (arXiv 2006.11239): plain residual blocks, 32 groups in a norm.

    It has no resampling filter, and no progressive input or output.
    """

    keys = UNET | CONV
    fixed = {
        "embedding_type": "positional",
        "resblock_type": "ddpm",
        "norm": partial(group_norm, group_width=1),
        "skip_rescale": False,
        "init_scale": 0.0,
        "fir_kernel": None,
        "progressive": "none",
        "progressive_input": "none",
    }
