"""A small network without convolutions: for points, or images of few pixels."""

import math
from typing import Self

import torch
from torch import Tensor, nn

from configs.keys import named
from models.layers import ACTIVATIONS, PositionalFeatures, check_whole, refuse
from sources.codec import Shape

OCTAVES = 4  # frequencies of the sines and cosines of each coordinate


class Block(nn.Module):
    """A residual block (B, width) of two layers, the noise embedding added between them."""

    def __init__(self, width: int, act: nn.Module):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.embedding, self.act = nn.Linear(width, width), act
        nn.init.zeros_(self.outer.weight)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.outer(self.act(self.inner(self.act(h)) + self.embedding(emb)))


class MLP(nn.Module):
    """Residual layers from images (B, *shape) and noise labels (B,) to (B, out_channels, H, W).

    Images may be of any norm r, as those of a Poisson flow far from the data are. The layers see

        x asinh(r) / r              which grows as log r,
        p / (1 + |p|)               the direction of p = (x, noise label), and
        sin, cos (x / sqrt(1 + r^2))    at several frequencies (arXiv 2006.10739), in the unit ball.

    Args:
        shape: (C, H, W) of the images.
        out_channels: of the output.
        nf: width of the layers.
        num_blocks: residual blocks, of two layers each.
        nonlinearity: 'elu', 'lrelu', 'relu' or 'swish'.
    """

    reads = {"model.num_res_blocks": None}

    @classmethod
    def from_config(cls, config, shape: Shape, out_channels: int) -> Self:
        """The network that the config describes; ValueError for a number that is not positive."""
        model = config.model
        check_whole(model, "nf", "num_res_blocks")
        return cls(shape, out_channels, model.nf, model.num_res_blocks, model.nonlinearity)

    def __init__(
        self,
        shape: tuple[int, int, int],
        out_channels: int,
        nf: int = 128,
        num_blocks: int = 3,
        nonlinearity: str = "swish",
    ):
        super().__init__()
        act = named(ACTIVATIONS, "model.nonlinearity", nonlinearity)
        self.shape = (out_channels, *shape[1:])
        octaves = math.pi / 2 * 2.0 ** torch.arange(OCTAVES)
        self.register_buffer("octaves", octaves, persistent=False)
        self.positions = PositionalFeatures(nf)
        self.embed = nn.Sequential(nn.Linear(nf + 1, nf), act)
        entries = math.prod(shape)
        self.stem = nn.Linear(entries * (2 + 2 * OCTAVES) + 1, nf)
        self.blocks = nn.ModuleList(Block(nf, act) for _ in range(num_blocks))
        self.head = nn.Sequential(act, nn.Linear(nf, math.prod(self.shape)))

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        refuse(class_labels=class_labels, augment_labels=augment_labels)
        x, label = x.flatten(1), noise_label.to(x)[:, None]
        emb = self.embed(torch.cat([self.positions(noise_label).to(x), (100 * label).asinh()], 1))
        r = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-6)
        direction = torch.cat([x, label], 1) / (1 + (r**2 + label**2).sqrt())
        angles = ((x * (1 + r**2).rsqrt())[..., None] * self.octaves).flatten(1)
        inputs = [x * (r.asinh() / r), direction, angles.sin(), angles.cos()]
        h = self.stem(torch.cat(inputs, 1))
        for block in self.blocks:
            h = block(h, emb)
        return self.head(h).unflatten(1, self.shape)
