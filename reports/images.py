"""Images as arrays of bytes, and grids of them."""

import logging
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sources.images import resize
from storage.files import save_png

log = logging.getLogger(__name__)

SIDE_BY_SIDE = 4  # channels in a picture of images without colours
GRID_SAMPLES = 100  # samples of a run or an evaluation that its picture shows
CLASS_ROWS = 10  # most classes of a picture with a row for each
LONGEST = 4  # side of an enlarged image, in units of the least one
LARGEST = 9216  # side of a picture: WebP allows 16,383, and Pillow reads 89 megapixels

Images = NDArray[np.uint8]  # (n, H, W, C)


def channels_last(images: Tensor) -> NDArray:
    """The array (B, H, W, C) of images (B, C, H, W) on any device."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def visible(images: Images) -> Images:
    """Pictures (n, H, W', 1 or 3) of `images` (n, H, W, C), unchanged where C is 1 or 3.

    For any other C, the first `SIDE_BY_SIDE` channels stand side by side in grey.
    """
    n, height, width, channels = images.shape
    if channels in (1, 3):
        return images
    planes = images[..., :SIDE_BY_SIDE].transpose(0, 1, 3, 2)
    return planes.reshape(n, height, -1, 1)


def image_grid(
    images: Images, columns: int | None = None, min_size: int = 48, gap: int = 2
) -> Images:
    """One picture (H', W', 3) of `images`, row by row, in a near-square grid or in `columns`.

    Images smaller than `min_size` are enlarged by a whole factor, long ones to at most `LONGEST`
    times that; `gap` pixels lie between them.
    A picture wider or higher than `LARGEST` pixels is reduced. Channels are shown as by `visible`.
    Points of the plane, images (1, 1, 2), are dots of one square picture instead.
    """
    if images.shape[1:] == (1, 1, 2):
        return _dots(images[:, 0, 0])
    short, long = sorted(images.shape[1:3])
    factor = max(1, min(math.ceil(min_size / short), LONGEST * min_size // long))
    images = visible(images)
    n, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    room = min(((LARGEST - gap) / k - gap) / side for k, side in ((rows, height), (columns, width)))
    if room < 1:
        height, width = (max(1, math.floor(side * room)) for side in (height, width))
        images = np.stack([resize(image, height, width) for image in images])
    factor = max(1, min(factor, math.floor(room)))
    height, width = height * factor + gap, width * factor + gap  # with the gap before each
    cells = np.full((rows * columns, height, width, 3), 128, dtype=np.uint8)
    cells[:n, gap:, gap:] = images.repeat(factor, axis=1).repeat(factor, axis=2)
    grid = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    grid = grid.reshape(rows * height, columns * width, 3)
    return np.pad(grid, ((0, gap), (0, gap), (0, 0)), constant_values=128)


def _dots(points: NDArray[np.uint8], side: int = 2) -> Images:
    """The `points` (n, 2), across and up, as black squares of `side` pixels, (H', W', 3)."""
    picture = np.full((256, 256, 3), 255, np.uint8)
    picture[255 - points[:, 1], points[:, 0]] = 0
    return picture.repeat(side, axis=0).repeat(side, axis=1)


def class_rows(classes: int, class_label: int) -> int:
    """Rows of the pictures that have one for each class; 0 where they have none.

    It is 0 without classes, with more than `CLASS_ROWS`, and if all samples are of a `class_label`.
    """
    return classes if classes <= CLASS_ROWS and class_label < 0 else 0


def by_class(images: Images, labels: NDArray, classes: int, columns: int) -> Images:
    """A row of the first `columns` of `images` of each class; grey where it has fewer."""
    rows = np.full((classes, columns, *images.shape[1:]), 128, np.uint8)
    for label in range(classes):
        of_class = images[labels == label][:columns]
        rows[label, : len(of_class)] = of_class
    return rows.reshape(-1, *images.shape[1:])


def save_grid(path: Path, images: Images, columns: int | None = None) -> None:
    """Write a picture of `images` in a grid, and log its path."""
    save_png(path, image_grid(images, columns))
    log.info(f"picture: {path}")
