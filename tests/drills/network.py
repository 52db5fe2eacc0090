"""A new network in one file: a small DiT, a transformer of patches (arXiv 2212.09748)."""

import ml_collections
import torch
from torch import Tensor, nn

import models
from configs.poisson import digits_ddpmpp
from models.layers import PositionalFeatures

PATCH, WIDTH, HEADS = 2, 32, 4


class Block(nn.Module):
    """Attention and MLP of tokens (B, N, WIDTH), each scaled, shifted and gated by the noise."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in "ab")
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, noise: Tensor) -> Tensor:
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(noise)[:, None].chunk(6, -1)
        n = self.norms[0](h) * (1 + scale) + shift
        h = h + gate * self.attention(n, n, n, need_weights=False)[0]
        return h + gate2 * self.mlp(self.norms[1](h) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """(x (B, C, H, W), noise_label (B,)) -> (B, out_channels, H, W)."""

    def __init__(self, channels: int, out_channels: int, size: int, depth: int = 2):
        super().__init__()
        self.features = PositionalFeatures(WIDTH)
        self.noise = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.patches = nn.Conv2d(channels, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.ConvTranspose2d(WIDTH, out_channels, PATCH, stride=PATCH)

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict, out_channels: int) -> "DiT":
        return cls(config.data.num_channels, out_channels, config.data.image_size)

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
    config.model.name = "dit"
    return config
