"""Sizes of images before they are cut and resized, and text on what is done to them."""

from collections.abc import Sequence

import numpy as np

from sources.base import Unreadable, View
from sources.files import Files
from sources.images import Size

SAMPLED = 64  # images whose sizes are read, if there are more than FEW
FEW = 1024  # up to so many images all sizes are read


def sizes_of(view: View) -> list[Size]:
    """Sizes of the original images of `view`: of all up to `FEW`, else of `SAMPLED` spread evenly.

    Images that cannot be read are left out.
    """
    number, sizes = len(view.index), []
    for i in np.linspace(0, number - 1, number if number <= FEW else SAMPLED).astype(int):
        at, images = int(view.index[i]), view.source
        try:
            is_file = isinstance(images, Files)
            sizes.append(images.header(at).size if is_file else images[at].shape[:2])
        except Unreadable:
            continue
    return sizes


def made_of(view: View, size: int) -> str:
    """Text on the original sizes of `view` and how images are cut and resized; "" if they are not.

    It covers the images of `sizes_of`, and says so where these are not all.
    """
    sizes = sizes_of(view)
    if not (texts := changes(sizes, size)):
        return ""
    number = "" if len(view.index) <= FEW else f" of those looked at, {len(sizes)} in all"
    return f"made of {extent(sizes)} pixels{number}: {', '.join(texts)}"


def changes(sizes: Sequence[Size], size: int) -> list[str]:
    """Texts on how images of these `sizes` change when a square is cut and resized to `size`.

    One text for each kind of change, with the number of images: cut, reduced, enlarged.
    """
    sides = [min(height, width) for height, width in sizes]
    counts = {
        "cut to the central square": sum(height != width for height, width in sizes),
        f"reduced to {size} x {size}": sum(side > size for side in sides),
        f"enlarged to {size} x {size}": sum(side < size for side in sides),
    }
    return [f"{count:,} of {len(sizes):,} {change}" for change, count in counts.items() if count]


def extent(sizes: Sequence[Size]) -> str:
    """The range of `sizes`, by their number of pixels: "20 x 30 to 480 x 640", height first."""
    ends = (min(sizes, key=np.prod), max(sizes, key=np.prod))
    return " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in ends))
