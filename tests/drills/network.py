"""A new network in one file: a small DiT, a transformer of patches (arXiv 2212.09748)."""

import ml_collections
import torch
from torch import Tensor, nn

import models
from configs.poisson import digits_ddpmpp
from configs.schema import Key, whole
from models.layers import PositionalFeatures


class Block(nn.Module):
    """Attention and MLP of tokens (B, N, width), each scaled, shifted and gated by the noise."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in "ab")
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, noise: Tensor) -> Tensor:
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(noise)[:, None].chunk(6, -1)
        n = self.norms[0](h) * (1 + scale) + shift
        h = h + gate * self.attention(n, n, n, need_weights=False)[0]
        return h + gate2 * self.mlp(self.norms[1](h) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """(x (B, C, H, W), noise_label (B,)) -> (B, out_channels, H, W).

    Raises ValueError where the patches do not fill the images.
    """

    keys = {
        "model.patch": Key(2, whole(1, 256), "DiT: side of its patches, in pixels"),
        "model.depth": Key(2, whole(1, 256), "DiT: blocks"),
        "model.heads": Key(4, whole(1, 256), "DiT: of the attention; they divide model.nf"),
    }

    def __init__(self, shape, out_channels: int, width: int, patch: int, depth: int, heads: int):
        super().__init__()
        channels, *sides = shape
        if any(side % patch for side in sides) or width % heads:
            raise ValueError(
                f"model.patch={patch} has to divide the sides {sides}, and model.heads={heads} "
                f"model.nf={width}"
            )
        rows, columns = (side // patch for side in sides)
        self.features = PositionalFeatures(width)
        self.noise = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, rows * columns, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.ConvTranspose2d(width, out_channels, patch, stride=patch)

    @classmethod
    def from_config(cls, config, shape, out_channels: int) -> "DiT":
        model = config.model
        return cls(shape, out_channels, model.nf, model.patch, model.depth, model.heads)

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        patches = self.patches(x)
        h = patches.flatten(2).mT + self.positions
        noise = self.noise(self.features(noise_label))
        for block in self.blocks:
            h = block(h, noise)
        return self.head(h.mT.unflatten(2, patches.shape[2:]))


models.NETWORKS["dit"] = DiT.from_config


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.model.update(name="dit", nf=32)
    return config
