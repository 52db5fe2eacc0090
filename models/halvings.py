"""Halvings of images between the levels of a network, and the padding that sides need for them."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from sources.images import ImageSize, Size, sides_of

Factors = tuple[int, int]  # vertical and horizontal, by which images are resampled: 2, or 1


@dataclass(frozen=True)
class Halvings:
    """Halvings of the height and the width of images between the levels of a network.

    Sides that do not halve often enough are padded within a call, and the output is cut. A side
    that has become 1 is halved no further: signals, which have a height of 1, keep it.

    Attributes:
        sides: (height, width) at each level, the first after padding.
        factors: (vertical, horizontal) between each two levels, 2 or 1.
        multiples: height and width are padded to multiples of these.
    """

    sides: tuple[Size, ...]
    factors: tuple[Factors, ...]
    multiples: Size

    @classmethod
    def of(cls, image_size: ImageSize, number: int) -> Self:
        """The halvings, `number` of them, of images of `image_size`, one number or two."""
        sides, factors = [tuple(_padded(side, number) for side in sides_of(image_size))], []
        for _ in range(number):
            factors.append(tuple(2 if side > 1 else 1 for side in sides[-1]))
            sides.append(tuple(s // f for s, f in zip(sides[-1], factors[-1], strict=True)))
        multiples = tuple(first // last for first, last in zip(sides[0], sides[-1], strict=True))
        return cls(tuple(sides), tuple(factors), multiples)

    def margins(self, x: Tensor) -> list[int]:
        """Pixels (left, right, top, bottom) to pad `x` (B, C, H, W) by, so that its sides halve."""
        height, width = x.shape[2:]
        rows, columns = -height % self.multiples[0], -width % self.multiples[1]
        return [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]

    def remarks(self, image_size: ImageSize) -> list[str]:
        """A line on the padding of images of `image_size` where there is any."""
        old, new = sides_of(image_size), self.sides[0]
        if old == new:
            return []
        cost = math.prod(new) / math.prod(old)
        return [
            f"the network pads {old[0]} x {old[1]} images to {new[0]} x {new[1]}, since it "
            f"halves them {len(self.factors)} times: {cost:.2f} times the pixels"
        ]


def _padded(side: int, halvings: int) -> int:
    """`side`, or the next larger one that can be halved so many times, or until it is 1."""
    multiple = min(2**halvings, 2 ** (side - 1).bit_length())
    return math.ceil(side / multiple) * multiple


def attention_remarks(
    halvings: Halvings,
    attn_resolutions: Sequence[int],
    narrow_levels: Collection[int],
    narrow_middle: bool,
) -> list[str]:
    """Lines on configured attention that a network lacks.

    Args:
        halvings: those between the network's levels.
        attn_resolutions: longer sides of the levels that are to have attention.
        narrow_levels: longer sides of the levels that have too few channels for a head.
        narrow_middle: the middle of the network has too few channels too.
    """
    sizes = [*map(max, halvings.sides)]
    levels, middle = ", ".join(map(str, sizes)), ", nor in the middle" if narrow_middle else ""
    reasons = (
        (
            {*attn_resolutions} - {0, *sizes},
            f": the levels of the network are {levels} wide"
            if len({*halvings.sides[0]}) == 1
            else f": the longer sides of the network's levels are {levels}",
        ),
        (narrow_levels, f"{middle}: too few channels for a head (model.nf, model.ch_mult)"),
    )
    return [
        f"model.attn_resolutions: there is no attention at "
        f"{', '.join(str(size) for size in attn_resolutions if size in lacking)}{reason}"
        for lacking, reason in reasons
        if {*attn_resolutions} & {*lacking}
    ]


def padded(x: Tensor, margins: Sequence[int]) -> Tensor:
    """`x` with its edge pixels repeated, so that noise stays noise; `x` itself without margins."""
    return F.pad(x, margins, mode="replicate") if any(margins) else x


def cut(x: Tensor, margins: Sequence[int]) -> Tensor:
    """`x` without its `margins`."""
    return F.pad(x, [-margin for margin in margins]) if any(margins) else x
