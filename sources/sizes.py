"""Sizes of images before they are cut and resized, and text on what is done to them."""

import operator
from collections.abc import Sequence

import numpy as np

from sources.base import Source, Unreadable, View, spread
from sources.files import Files
from sources.images import ImageSize, Size, largest_part, sides_of

SAMPLED = 64  # images whose sizes are read, if there are more than FEW
FEW = 1024  # up to so many images all sizes are read


def sizes_of(view: View) -> list[Size]:
    """Sizes of the original images of `view`: of all up to `FEW`, else of `SAMPLED` spread evenly.

    Images that cannot be read are left out.
    """
    number, sizes = len(view.index), []
    for i in spread(number, number if number <= FEW else SAMPLED):
        at, images = int(view.index[i]), view.source
        try:
            is_file = isinstance(images, Files)
            sizes.append(images.header(at).size if is_file else images[at].shape[:2])
        except Unreadable:
            continue
    return sizes


def shapes_of(source: Source, most: int) -> list[tuple[int, int, int]]:
    """Shapes (H, W, C) of up to `most` images, spread over the source, that can be read.

    Raises ValueError where none of them can.
    """
    shapes, error = [], None
    for i in spread(len(source), most):
        try:
            shapes.append(source[i].shape)
        except Unreadable as unreadable:
            error = unreadable
    if not shapes:
        raise ValueError(f"none of {min(len(source), most)} images can be used; the last: {error}")
    return shapes


def made_of(view: View, size: ImageSize) -> str:
    """Text on the original sizes of `view` and how images are cut and resized; "" if they are not.

    It covers the images of `sizes_of`, and says so where these are not all.
    """
    sizes = sizes_of(view)
    if not (texts := changes(sizes, size)):
        return ""
    number = "" if len(view.index) <= FEW else f" of those looked at, {len(sizes)} in all"
    return f"made of {extent(sizes)} pixels{number}: {', '.join(texts)}"


def changes(sizes: Sequence[Size], size: ImageSize) -> list[str]:
    """Texts on how images of these `sizes` change when they are cut and resized to `size`.

    One text for each kind of change, with the number of images: cut, reduced, enlarged.
    """
    height, width = sides_of(size)
    parts = [largest_part(original, size) for original in sizes]
    ratio = "square" if height == width else f"part in the ratio {height} : {width}"
    counts = {
        f"cut to the central {ratio}": sum(map(operator.ne, parts, sizes)),
        f"reduced to {height} x {width}": sum(part > (height, width) for part in parts),
        f"enlarged to {height} x {width}": sum(part < (height, width) for part in parts),
    }
    return [f"{count:,} of {len(sizes):,} {change}" for change, count in counts.items() if count]


def extent(sizes: Sequence[Size]) -> str:
    """The range of `sizes`, by their number of pixels: "20 x 30 to 480 x 640", height first."""
    ends = (min(sizes, key=np.prod), max(sizes, key=np.prod))
    return " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in ends))
