"""A network of given sides on larger images: the mean of its outputs on overlapping tiles.

Noise needs no tiles: the part of a Student t on a tile has the same law, with the same degrees of
freedom, so that each tile is noisy as in training.
"""

import math
from itertools import product

import torch
from torch import Tensor, nn


def starts(length: int, tile: int) -> list[int]:
    """First entries of the fewest tiles over `length` that overlap by half at least, evenly."""
    number = 1 + math.ceil((length - tile) / max(1, tile - tile // 2))
    if number == 1:
        return [0]
    return [round(i * (length - tile) / (number - 1)) for i in range(number)]


def ramp(start: int, length: int, tile: int) -> Tensor:
    """Weights (tile,), float64, of a tile's entries along one axis.

    Towards the edge of the image they are 1. Towards a neighbour they fall from 1, at three eighths
    of the tile, to 0 in its last eighth, where a network on the whole would see beyond the tile.
    """
    place = torch.arange(tile, dtype=torch.float64)
    distance = torch.full_like(place, math.inf)  # to the next inner edge, from an entry's centre
    if start > 0:
        distance = distance.minimum(place + 0.5)
    if start + tile < length:
        distance = distance.minimum(tile - place - 0.5)
    share = ((distance - tile / 8) / (tile / 4)).clamp(0, 1)
    return (math.pi / 2 * share).sin().square()


class Tiled(nn.Module):
    """A network made for the `sides` (h, w), applied to x (B, C, H, W) of larger sides.

    Its output is a weighted mean over tiles that overlap by half or more. It is that of the network
    on the whole if no output depends on entries farther away than an eighth of a tile.
    """

    def __init__(self, network: nn.Module, sides: tuple[int, int]):
        super().__init__()
        self.network, self.sides = network, sides

    def state_dict(self, *args, **kwargs) -> dict:
        """The state dict of the network itself."""
        return self.network.state_dict(*args, **kwargs)

    def forward(self, x: Tensor, noise_label: Tensor, **conditions: Tensor) -> Tensor:
        for name, rows in conditions.items():
            if rows.dim() == 4 and rows.shape[2:] != x.shape[2:]:
                raise ValueError(
                    f"sampling.size: the condition {name!r} has {rows.shape[2]} x {rows.shape[3]} "
                    f"pixels, not the {x.shape[2]} x {x.shape[3]} of the samples"
                )
        axes = [*zip(x.shape[2:], self.sides, strict=True)]
        total, weights = 0, x.new_zeros(x.shape[2:])
        for corner in product(*(starts(length, tile) for length, tile in axes)):
            part = tuple(slice(at, at + tile) for at, tile in zip(corner, self.sides, strict=True))
            down, across = (ramp(at, *axis) for at, axis in zip(corner, axes, strict=True))
            weight = torch.outer(down, across).to(x)
            of_tile = {
                name: rows[(..., *part)] if rows.dim() == 4 else rows
                for name, rows in conditions.items()
            }
            output = self.network(x[(..., *part)], noise_label, **of_tile)
            (top, left), (height, width) = corner, x.shape[2:]
            edges = (left, width - left - self.sides[1], top, height - top - self.sides[0])
            total = total + nn.functional.pad(weight * output, edges)
            weights[part] += weight
        return total / weights
