"""Images as arrays of bytes, and grids of them."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Images = NDArray[np.uint8]  # (n, H, W, C)


def to_uint8(images: Tensor) -> Images:
    """Images in [0, 1], (B, C, H, W), as uint8 (B, H, W, C)."""
    return channels_last((images * 255).round().to(torch.uint8))


def channels_last(images: Tensor) -> NDArray:
    """(B, C, H, W) on any device as an array (B, H, W, C)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def image_grid(
    images: Images, columns: int | None = None, min_size: int = 48, gap: int = 2
) -> Images:
    """One picture (H', W', 3) of `images`, row by row, in a near-square grid or in `columns`.

    Images smaller than `min_size` are enlarged by a whole factor; `gap` pixels lie between them.
    """
    n, height, width, channels = images.shape
    factor = max(1, math.ceil(min_size / min(height, width)))
    images = np.broadcast_to(images, (n, height, width, 3)) if channels == 1 else images
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cell_height, cell_width = height * factor + gap, width * factor + gap
    grid = np.full((rows * cell_height + gap, columns * cell_width + gap, 3), 128, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * cell_height, gap + i % columns * cell_width
        grid[top : top + height * factor, left : left + width * factor] = image
    return grid
