"""Patches of larger images: random ones for training, a fixed one of each for all else."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import Key, Numbers, whole
from sources import digests
from sources.base import Source
from sources.images import Size
from sources.keyed import keyed_seed

KEYS = {
    "data.patch": Key(
        (),
        Numbers(whole(1, 4096), (0, 2)),
        "(height, width) of the patches that the network sees: random ones in training, a fixed "
        "one of each image in evaluation; (): whole images. sampling.size draws larger samples",
    ),
}


def random_cut(
    images: Tensor, sides: Size, generator: torch.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """A function that cuts a patch of `sides` (h, w) of each image (B, C, H, W), anywhere in it.

    It cuts all tensors of the number and sides of `images` at the same places.
    """
    height, width = images.shape[2:]
    draw = {"generator": generator, "device": images.device}
    top = torch.randint(height - sides[0] + 1, (len(images), 1), **draw)
    left = torch.randint(width - sides[1] + 1, (len(images), 1), **draw)
    rows, columns = (torch.arange(side, device=images.device) for side in sides)

    def cut(whole: Tensor) -> Tensor:
        numbers, channels = (torch.arange(n, device=whole.device) for n in whole.shape[:2])
        return whole[
            numbers[:, None, None, None],
            channels[:, None, None],
            (top + rows)[:, None, :, None],
            (left + columns)[:, None, None, :],
        ]

    return cut


@dataclass(frozen=True)
class Patches:
    """A patch of `sides` (h, w) of each image of a source, at a place drawn from its number."""

    source: Source
    sides: Size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> NDArray:
        image = self.source[i]
        random = np.random.default_rng(keyed_seed("patch", i))
        rooms = (max(1, old - new + 1) for old, new in zip(image.shape, self.sides, strict=False))
        top, left = (int(random.integers(room)) for room in rooms)
        return image[top:, left:][: self.sides[0], : self.sides[1]]

    def digest(self) -> str:
        """The digest of the whole images, and of the sides of the patches."""
        return digests.joined(digests.of_source(self.source), str(tuple(self.sides)))
