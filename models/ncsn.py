"""The RefineNets of NCSN and NCSNv2.

NCSN's norms depend on the noise level; NCSNv2 does not see it, and divides its output by it.

Sources: Song and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution"
(arXiv 1907.05600), appendix A; "Improved Techniques for Training Score-Based Generative Models"
(arXiv 2006.09011); Lin et al., "RefineNet" (arXiv 1611.06612).

The modules have the names and the order of the published weights.
"""

from collections import OrderedDict
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.keys import named
from models.halvings import Factors, Halvings, cut, padded
from models.layers import ACTIVATIONS, Norm, check_whole, geometric_sigmas, refuse
from sources.codec import Shape
from sources.images import ImageSize


class Level(NamedTuple):
    """One level of a RefineNet.

    Each level but the first halves the resolution, or, where dilated, widens its view instead.
    """

    encoder: str  # name of its block in the encoder
    decoder: str  # name of the block in the decoder that fuses its features
    width: int  # of its features, in units of `nf`
    dilation: int = 1  # of the encoder's convolutions


LAYOUTS = {
    "64": (
        Level("res1", "refine4", 1),
        Level("res2", "refine3", 2),
        Level("res3", "refine2", 2, dilation=2),
        Level("res4", "refine1", 2, dilation=4),
    ),
    "128": (
        Level("res1", "refine5", 1),
        Level("res2", "refine4", 2),
        Level("res3", "refine3", 2),
        Level("res4", "refine2", 4, dilation=2),
        Level("res5", "refine1", 4, dilation=4),
    ),
}
LAYOUTS["256"] = (*LAYOUTS["128"][:3], Level("res31", "refine31", 2), *LAYOUTS["128"][3:])

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding="same")  # "same" for every dilation


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ (arXiv 1907.05600, appendix A), which keeps the means of the channels:

        gamma * (instance_norm(x) + alpha * standardised means) + beta,  x (B, C, H, W).

    With `num_classes` gamma, alpha and beta are looked up for each image by its label (B,); else
    they are learned vectors and the labels are not used.
    """

    def __init__(self, channels: int, *, num_classes: int | None = None):
        super().__init__()
        self.embed = None
        if num_classes is None:
            self.alpha = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
            self.gamma = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
            self.beta = nn.Parameter(torch.zeros(channels))
        else:
            self.embed = nn.Embedding(num_classes, 3 * channels)
            nn.init.normal_(self.embed.weight[:, : 2 * channels], 1, 0.02)
            nn.init.zeros_(self.embed.weight[:, 2 * channels :])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.embed is None:
            gamma, alpha, beta = self.gamma, self.alpha, self.beta
        else:
            gamma, alpha, beta = self.embed(labels).chunk(3, dim=1)
        means = x.mean(dim=(2, 3))
        var, mean = torch.var_mean(means, dim=1, keepdim=True)
        means = (means - mean) * torch.rsqrt(var + 1e-5)
        shift = torch.addcmul(beta, gamma * alpha, means)
        scale = gamma.expand_as(shift)
        return torch.addcmul(shift[..., None, None], scale[..., None, None], F.instance_norm(x))


class NoNorm(nn.Module):
    """Identity, where NCSNv2 has no norm."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return x


def conv_mean_pool(
    in_channels: int, out_channels: int, size: int, factors: Factors
) -> nn.Sequential:
    layer = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    return nn.Sequential(OrderedDict(conv=layer, pool=nn.AvgPool2d(factors)))


class ResidualBlock(nn.Module):
    """Two rounds of norm, activation and convolution, and a shortcut.

    With `down` it divides the sides by `factors`, or, where dilated, only changes the width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: Norm,
        act: nn.Module,
        dilation: int,
        down: bool = False,
        factors: Factors = (2, 2),
    ):
        super().__init__()
        pool = down and dilation == 1
        middle = in_channels if down else out_channels
        self.conv1 = conv3x3(in_channels, middle, dilation=dilation)
        self.normalize2 = norm(middle)
        if pool:
            self.conv2 = conv_mean_pool(middle, out_channels, 3, factors)
            self.shortcut = conv_mean_pool(in_channels, out_channels, 1, factors)
        else:
            self.conv2 = conv3x3(middle, out_channels, dilation=dilation)
            self.shortcut = conv3x3(in_channels, out_channels, dilation=dilation) if down else None
        self.normalize1 = norm(in_channels)
        self.act = act

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.conv1(self.act(self.normalize1(x, labels)))
        h = self.conv2(self.act(self.normalize2(h, labels)))
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class ResidualUnits(nn.ModuleDict):
    """Residual units of two layers, each a norm, activation, convolution.

    Entry `i_j_conv` is layer j of unit i.
    """

    def __init__(self, channels: int, *, units: int, norm: Norm, act: nn.Module):
        super().__init__()
        self.units, self.act = range(1, units + 1), act
        for layer in (f"{i}_{j}" for i in self.units for j in (1, 2)):
            self[f"{layer}_norm"] = norm(channels)
            self[f"{layer}_conv"] = conv3x3(channels, channels, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for i in self.units:
            h = x
            for layer in (f"{i}_1", f"{i}_2"):
                h = self[f"{layer}_conv"](self.act(self[f"{layer}_norm"](h, labels)))
            x = h.add_(x)
        return x


class MultiResolutionFusion(nn.Module):
    """Features of different resolutions, each through a convolution, summed at the finest."""

    def __init__(self, in_channels: list[int], out_channels: int, *, norm: Norm):
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(width, out_channels) for width in in_channels)
        self.norms = nn.ModuleList(norm(width) for width in in_channels)

    def forward(self, features: list[Tensor], labels: Tensor) -> Tensor:
        total, size = 0, features[0].shape[2:]
        for h, conv, norm in zip(features, self.convs, self.norms, strict=True):
            h = conv(norm(h, labels))
            total = total + F.interpolate(h, size=size, mode="bilinear", align_corners=True)
        return total


class ChainedPooling(nn.Module):
    """The features and the results of two rounds of norm, 5x5 pooling and convolution, summed.

    It pools by the mean where it norms, else by the maximum.
    """

    def __init__(self, channels: int, *, norm: Norm, act: nn.Module):
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(channels, channels, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(norm(channels) for _ in range(2))
        self.act = act
        self.pool = (nn.MaxPool2d if norm is NoNorm else nn.AvgPool2d)(5, stride=1, padding=2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        total = path = self.act(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            path = conv(self.pool(norm(path, labels)))
            total = total + path
        return total


class RefineBlock(nn.Module):
    """Refines coarse features by finer ones: adapt each, fuse them, pool, and adapt the result."""

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        *,
        norm: Norm,
        act: nn.Module,
        output_units: int = 1,
    ):
        super().__init__()
        self.adapt_convs = nn.ModuleList(
            ResidualUnits(width, units=2, norm=norm, act=act) for width in in_channels
        )
        self.output_convs = ResidualUnits(out_channels, units=output_units, norm=norm, act=act)
        self.msf = None
        if len(in_channels) > 1:
            self.msf = MultiResolutionFusion(in_channels, out_channels, norm=norm)
        self.crp = ChainedPooling(out_channels, norm=norm, act=act)

    def forward(self, features: list[Tensor], labels: Tensor) -> Tensor:
        adapted = [adapt(h, labels) for adapt, h in zip(self.adapt_convs, features, strict=True)]
        h = adapted[0] if self.msf is None else self.msf(adapted, labels)
        return self.output_convs(self.crp(h, labels), labels)


class RefineNet(nn.Module):
    """Network from images (B, channels, H, W) and the numbers (B,) of their noise levels to scores.

    Args:
        layout: key of `LAYOUTS`, the image size for which its levels were made.
        image_size: height and width of the images, one number if they are equal.
        conditional: every norm depends on the noise level (NCSN); else none does, and the output is
            divided by the noise level instead (NCSNv2).
        sigmas: the noise levels (num_scales,) that the labels number.
        centered: `x` is in [-1, 1]; else in [0, 1], and is centred first.
        nf, channels, nonlinearity: see `models.unet.UNet`.

    Raises:
        ValueError: the nonlinearity is unknown, or the images of the coarsest level have one pixel,
            which the norms cannot take.
    """

    # Keys that others declare; the levels themselves only where the output is divided by them.
    reads = {
        "data.centered": None,
        "training.continuous": None,
        "model.num_scales": None,
        "model.checkpoint_activations": None,
        "model.augment_dim": None,
        "model.scale_by_sigma": None,
        "model.sigma_min": "model.scale_by_sigma",
        "model.sigma_max": "model.scale_by_sigma",
    }

    @classmethod
    def from_config(
        cls, config, shape: Shape, out_channels: int, *, layout: str, conditional: bool = False
    ) -> Self:
        """The network that `config.model` describes; ValueError for options it does not have."""
        data, model = config.data, config.model
        check_whole(model, "nf", "num_scales")
        for rule, is_broken in (
            ("gives the channels of the image and no more", out_channels != shape[0]),
            ("needs training.continuous = False", config.training.continuous),
            ("needs model.checkpoint_activations = False", model.checkpoint_activations),
            ("takes no class or augmentation labels", data.num_classes or model.augment_dim),
            (f"has model.scale_by_sigma = {not conditional}", model.scale_by_sigma == conditional),
        ):
            if is_broken:
                raise ValueError(
                    f"model.name = {model.name!r} {rule}; if that does not fit, use 'ncsnpp'"
                )
        return cls(
            layout=layout,
            image_size=shape[1:],
            conditional=conditional,
            sigmas=geometric_sigmas(model.sigma_max, model.sigma_min, model.num_scales),
            channels=shape[0],
            nf=model.nf,
            nonlinearity=model.nonlinearity,
            centered=data.centered,
        )

    def __init__(
        self,
        *,
        layout: str,
        image_size: ImageSize,
        conditional: bool,
        sigmas: Tensor,
        channels: int = 3,
        nf: int = 128,
        nonlinearity: str = "elu",
        centered: bool = False,
    ):
        super().__init__()
        act = named(ACTIVATIONS, "model.nonlinearity", nonlinearity)
        levels = LAYOUTS[layout]
        self.act, self.centered = act, centered
        halves = [level.dilation == 1 for level in levels[1:]]
        self.halvings = Halvings.of(image_size, sum(halves))
        self.remarks = self.halvings.remarks(image_size)
        if self.halvings.sides[-1] == (1, 1):
            raise ValueError(
                f"the norms of a RefineNet need more than one pixel, which is what {sum(halves)} "
                f"halvings leave of data.image_size={image_size}: use 'ncsnpp', or larger images"
            )
        self.register_buffer("sigmas", None if conditional else sigmas.float(), persistent=False)

        norm = partial(InstanceNormPlus, num_classes=len(sigmas) if conditional else None)
        self.begin_conv = nn.Conv2d(channels, nf, 3, padding=1)
        self.normalizer = norm(nf)
        self.end_conv = nn.Conv2d(nf, channels, 3, padding=1)

        self.encoder = nn.ModuleDict()
        refine = partial(RefineBlock, norm=norm if conditional else NoNorm, act=act)
        decoder, last, factors = {}, len(levels) - 1, iter(self.halvings.factors)
        for i, level in enumerate(levels):
            finer, width = nf * levels[max(i - 1, 0)].width, nf * level.width
            block = partial(ResidualBlock, norm=norm, act=act, dilation=level.dilation)
            pooled = next(factors) if i > 0 and halves[i - 1] else (1, 1)
            self.encoder[level.encoder] = nn.ModuleList(
                [block(finer, width, down=i > 0, factors=pooled), block(width, width)]
            )
            # It fuses the level's features and those refined below it; the coarsest has no others.
            decoder[level.decoder] = refine(
                [width] * (1 if i == last else 2), finer, output_units=3 if i == 0 else 1
            )
        self.decoder = nn.ModuleDict({name: decoder[name] for name in sorted(decoder)})
        self.ascent = [level.decoder for level in reversed(levels)]

    def forward(
        self, x: Tensor, noise_label: Tensor, class_labels: None = None, augment_labels: None = None
    ) -> Tensor:
        refuse(class_labels=class_labels, augment_labels=augment_labels)
        labels = noise_label.round().long()
        margins = self.halvings.margins(x)
        x = padded(x, margins)
        h = self.begin_conv(x if self.centered else 2 * x - 1)

        skips = []
        for blocks in self.encoder.values():
            for block in blocks:
                h = block(h, labels)
            skips.append(h)

        refined = []
        for name in self.ascent:
            refined = [self.decoder[name]([skips.pop(), *refined], labels)]

        h = cut(self.end_conv(self.act(self.normalizer(refined[0], labels))), margins)
        if self.sigmas is not None:
            h = h / self.sigmas[labels].to(h.dtype)[:, None, None, None]
        return h
