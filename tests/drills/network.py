"""A new network in one file: a small MLP-Mixer, two MLPs in turn (arXiv 2105.01601)."""

import ml_collections
from torch import Tensor, nn

import models
from configs.poisson import digits_ddpmpp
from configs.schema import Key, whole
from models.layers import PositionalFeatures


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Block(nn.Module):
    """Patches (B, N, width), mixed among the N and then within each; the noise shifts both."""

    def __init__(self, patches: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in "ab")
        self.among, self.within = mlp(patches), mlp(width)
        self.shifts = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, noise: Tensor) -> Tensor:
        first, second = self.shifts(noise)[:, None].chunk(2, -1)
        h = h + self.among((self.norms[0](h) + first).mT).mT
        return h + self.within(self.norms[1](h) + second)


class Mixer(nn.Module):
    """(x (B, C, H, W), noise_label (B,)) -> (B, out_channels, H, W).

    Raises ValueError where the patches do not fill the images.
    """

    keys = {
        "model.mixer_patch": Key(2, whole(1, 256), "Mixer: side of its patches, in pixels"),
        "model.mixer_depth": Key(2, whole(1, 256), "Mixer: blocks"),
    }

    def __init__(self, shape, out_channels: int, width: int, patch: int, depth: int):
        super().__init__()
        channels, *sides = shape
        if any(side % patch for side in sides):
            raise ValueError(f"model.mixer_patch={patch} has to divide the sides {sides}")
        rows, columns = (side // patch for side in sides)
        self.features = PositionalFeatures(width)
        self.noise = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(rows * columns, width) for _ in range(depth))
        self.head = nn.ConvTranspose2d(width, out_channels, patch, stride=patch)

    @classmethod
    def from_config(cls, config, shape, out_channels: int) -> "Mixer":
        model = config.model
        return cls(shape, out_channels, model.nf, model.mixer_patch, model.mixer_depth)

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        patches = self.patches(x)
        h, noise = patches.flatten(2).mT, self.noise(self.features(noise_label))
        for block in self.blocks:
            h = block(h, noise)
        return self.head(h.mT.unflatten(2, patches.shape[2:]))


models.NETWORKS["mixer"] = Mixer.from_config


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.model.update(name="mixer", nf=32)
    return config
