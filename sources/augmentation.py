"""EDM's geometric augmentation: images are transformed at random, and the network is told how.

Source: Karras et al. 2022 (arXiv 2206.00364), appendix F.2 and its table of transformations. The
network learns the transformed images under their labels and the images as they are under the label
0, with which it samples. The resampling filters are a choice of this program.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sources.batch import Batch

LABELS = 9  # entries of an augmentation label
LEAST_SIDE = 3  # of an image, whose edges are reflected
SCALE, ANISOTROPY, TRANSLATION = 2**0.2, 2**0.2, 1 / 8

# Images are resampled on a lattice of half pixels, between the symmetric filters of Cohen,
# Daubechies and Feauveau (1992, the 9/7 pair): one after the other they change nothing, so that
# mirrored, shifted and quarter-turned images are exact but for rounding.
UP = (1.115087052457, 0.591271763114, -0.057543526229, -0.091271763114)  # from the centre outwards
DOWN = (0.602949018236, 0.266864118443, -0.078223266529, -0.016864118443, 0.026748757411)


def augment(
    batch: Batch, probability: float, shared: bool, generator: torch.Generator | None = None
) -> Batch:
    """`batch`, its images (B, C, H, W), float, transformed, with "augment_labels".

    Args:
        batch: scaled images.
        probability: see `draw_parameters`.
        shared: all images get the same transformation, so that a reference batch is transformed
            like each example.
        generator: source of the draws, on the device of the images.
    """
    images = batch.images
    number = 1 if shared else len(images)
    parameters = draw_parameters(number, probability, generator, images.device)
    parameters = parameters.expand(len(images), -1)
    batch = batch.moved(lambda rows: transform(rows, parameters))
    labels = {"augment_labels": labels_of(parameters)}
    return replace(batch, conditions=batch.conditions | labels)


def draw_parameters(
    number: int,
    probability: float,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The parameters a_0 to a_7 of random transformations, (number, 8).

    They mirror an axis where they are 1 (a_0, a_1), and are the exponent of the scale (a_2), an
    angle (a_3), angle and exponent of the anisotropy (a_4, a_5), the translation (a_6, a_7); 0 is
    none. Every image is mirrored left to right with probability 1/2; each of the five other groups
    is drawn with `probability`, in [0, 1], else 0.
    """
    draw = {"generator": generator, "device": device}
    uniform, normal = torch.rand(number, 4, **draw), torch.randn(number, 4, **draw)
    flip_x, flip_y = (uniform[:, :2] < 0.5).float().T
    turn, axis = (math.pi * (2 * uniform[:, 2:] - 1)).T
    scale, ratio, right, down = normal.T
    a, b, c, d, e = (torch.rand(number, 5, **draw) < probability).float().T
    masked = (a * flip_y, b * scale, c * turn, d * axis, d * ratio, e * right, e * down)
    return torch.stack([flip_x, *masked], 1)


def labels_of(parameters: Tensor) -> Tensor:
    """The labels (B, 9) that the network is given for `parameters` (B, 8); 0 for none."""
    flip_x, flip_y, scale, turn, axis, ratio, right, down = parameters.T
    turned = turn.cos() - 1, turn.sin()
    stretched = ratio * axis.cos(), ratio * axis.sin()
    return torch.stack([flip_x, flip_y, scale, *turned, *stretched, right, down], 1)


def transform(images: Tensor, parameters: Tensor) -> Tensor:
    """`images` (B, C, H, W) transformed by `parameters` (B, 8), reflected at their edges.

    In this order they are mirrored, scaled by SCALE^a_2, rotated by -a_3, stretched by
    ANISOTROPY^a_5 along the direction a_4 and shrunk as much across it, and moved right and down by
    TRANSLATION times their width and height, each at least `LEAST_SIDE`. Angles are clockwise.
    Images whose parameters are all 0 do not change in any bit.
    """
    *_, height, width = images.shape
    dtype = images.dtype
    flip_x, flip_y, scale, turn, axis, ratio, *moved = parameters.to(dtype).T
    stretch = ANISOTROPY**ratio
    inverse = (
        _diagonal((1 - 2 * flip_x) / SCALE**scale, (1 - 2 * flip_y) / SCALE**scale)
        @ _rotation(turn + axis)
        @ _diagonal(1 / stretch, stretch)
        @ _rotation(-axis)
    )
    # the lattice around the centre of the image, in units in which its left and right edge pixels
    # are at -1 and 1, its upper and lower ones at -ratio and ratio
    margin, half, ratio = len(DOWN) - 1, (width - 1) / 2, (height - 1) / (width - 1)

    def lattice(side: int) -> Tensor:
        ticks = torch.arange(-margin, 2 * side - 1 + margin, device=images.device, dtype=dtype)
        return ticks / (side - 1) - 1

    points = torch.meshgrid(lattice(width), ratio * lattice(height), indexing="xy")
    moves = zip((width, height), moved, strict=True)
    shift = torch.stack([TRANSLATION * side / half * move for side, move in moves], 1)
    points = (torch.stack(points, -1) - shift[:, None, None]) @ inverse.mT[:, None]
    points = torch.stack([points[..., 0], points[..., 1] / ratio], -1)
    spaced = images.new_zeros(*images.shape[:2], 2 * height + 7, 2 * width + 7)
    spaced[:, :, ::2, ::2] = F.pad(images, [2] * 4, mode="reflect")
    fine = _filtered(spaced[:, :, 1:-1, 1:-1], UP)
    fine = F.grid_sample(fine, points, padding_mode="reflection", align_corners=True)
    changed = (parameters != 0).any(1)[:, None, None, None]
    return torch.where(changed, _filtered(fine, DOWN, 2), images)


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y], 1))


def _rotation(angle: Tensor) -> Tensor:
    """Matrices (B, 2, 2) that turn (right, down) by `angle` (B,), clockwise as it is seen."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).unflatten(1, (2, 2))


def _filtered(x: Tensor, half: tuple[float, ...], step: int = 1) -> Tensor:
    """Every `step`-th pixel of `x` (B, C, H, W) under a filter, without the edges it sticks out of.

    `half` holds its symmetric taps from the centre outwards. They are numbers, since a tensor of
    them would have to be copied to the device, which waits.
    """
    taps = [*half[:0:-1], *half]
    for _ in range(2):
        end = x.shape[-1] - len(taps) + 1
        x = sum(tap * x[..., k : k + end : step] for k, tap in enumerate(taps)).mT
    return x
