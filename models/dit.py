"""DiT: a transformer of patches with adaLN-zero blocks (Peebles and Xie 2023, arXiv 2212.09748)."""

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import Key, whole
from models.layers import PositionalFeatures, check_whole, one_hot, refuse
from op.on_cpu import attention
from sources.codec import Shape


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised tokens (B, N, width), scaled and shifted by `scale` and `shift` (B, 1, width)."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """Attention and an MLP of tokens (B, N, width), each shifted, scaled and gated.

    Shifts, scales and gates are linear in the embedding (B, width) and 0 at first, so that a new
    block is the identity ("adaLN-zero").
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        for layer in (self.qkv, self.proj, self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)
        h = h + gate * self._attention(modulated(h, shift, scale))
        inner = self.inner(modulated(h, shift2, scale2))
        return h + gate2 * self.outer(F.gelu(inner, approximate="tanh"))

    def _attention(self, h: Tensor) -> Tensor:
        heads = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.contiguous()  # (B, heads, N, width / heads) each
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """From images (B, channels, H, W) and noise labels (B,) to (B, out_channels, H, W).

    Images of other sides than the shape's can be given in a call.

    Args:
        shape: (channels, H, W) of the images.
        out_channels: of the output.
        nf: width of the tokens, a multiple of 4.
        patch: side of a patch, which becomes a token; it divides both sides of the images.
        depth: number of blocks.
        heads: of the attention; they divide `nf`.
        num_classes: number of classes, labelled from 0.
        checkpoint_activations: keep only the inputs of each block for backward.

    Raises:
        ValueError: a number does not divide what it has to.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        "model.patch": Key(2, whole(1, 256), "DiT: side of a patch; it divides the images' sides"),
        "model.depth": Key(4, whole(1, 256), "DiT: blocks"),
        "model.heads": Key(4, whole(1, 256), "DiT: attention heads; they divide nf"),
    }
    reads: ClassVar[Mapping[str, str | None]] = {"model.checkpoint_activations": None}

    def __init__(
        self,
        shape: Shape,
        out_channels: int,
        nf: int = 128,
        patch: int = 2,
        depth: int = 4,
        heads: int = 4,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.patch, self.num_classes, self.out_channels = patch, num_classes, out_channels
        self.checkpoint_activations = checkpoint_activations
        self._check_sides(shape[1:])
        if nf % heads or nf % 4:
            raise ValueError(
                f"model.nf={nf} must be a multiple of 4, for the positions in the plane, and of "
                f"model.heads={heads}"
            )
        pixels = patch * patch
        self.features = PositionalFeatures(nf)
        self.positions = PositionalFeatures(nf // 2)
        self.embedding = nn.Sequential(nn.Linear(nf, nf), nn.SiLU(), nn.Linear(nf, nf))
        self.label_embedding = nn.Linear(num_classes, nf, bias=False) if num_classes else None
        self.tokens = nn.Linear(shape[0] * pixels, nf)
        self.blocks = nn.ModuleList(Block(nf, heads) for _ in range(depth))
        self.modulation, self.head = nn.Linear(nf, 2 * nf), nn.Linear(nf, out_channels * pixels)
        for layer in (self.embedding[0], self.embedding[2], self.label_embedding):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.xavier_uniform_(self.tokens.weight)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, config, shape: Shape, out_channels: int) -> Self:
        """The network that the config describes; raises as the constructor."""
        model = config.model
        check_whole(model, "nf", "patch", "depth", "heads")
        return cls(
            shape,
            out_channels,
            nf=model.nf,
            patch=model.patch,
            depth=model.depth,
            heads=model.heads,
            num_classes=config.data.num_classes,
            checkpoint_activations=model.checkpoint_activations,
        )

    def _check_sides(self, sides: tuple[int, int]) -> None:
        if any(side % self.patch for side in sides):
            raise ValueError(
                f"model.patch={self.patch} does not divide the sides of images of "
                f"{sides[0]} x {sides[1]}: set another model.patch or data.image_size"
            )

    def forward(self, x: Tensor, noise_label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The output (B, out_channels, H, W) at `x` (B, channels, H, W) and `noise_label` (B,).

        Class labels (B,), int64, are -1 for none. ValueError where the network has no classes.
        """
        self._check_sides(x.shape[2:])
        rows, columns = (side // self.patch for side in x.shape[2:])
        emb = self.embedding(self.features(noise_label).to(x.dtype))
        if self.num_classes:
            emb = emb + self.label_embedding(one_hot(class_labels, self.num_classes, x))
        else:
            refuse(class_labels=class_labels)
        emb = F.silu(emb)
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).mT  # (B, N, channels * patch^2)
        h = self.tokens(patches) + self._places(rows, columns, x)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                h = checkpoint(block, h, emb, use_reentrant=False)
            else:
                h = block(h, emb)
        shift, scale = self.modulation(emb)[:, None].chunk(2, -1)
        out = self.head(modulated(h, shift, scale))
        return F.pixel_shuffle(out.mT.unflatten(2, (rows, columns)), self.patch)

    def _places(self, rows: int, columns: int, x: Tensor) -> Tensor:
        """Sines and cosines (rows * columns, nf) of a token's row and column."""
        of_row, of_column = (
            self.positions(torch.arange(n, device=x.device, dtype=torch.float32)).to(x.dtype)
            for n in (rows, columns)
        )
        return torch.cat([of_row.repeat_interleave(columns, 0), of_column.repeat(rows, 1)], 1)
