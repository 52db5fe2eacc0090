"""Images of 16 bits a channel: their values, and conversion to 8 bits.

Few use the whole range: a scanner of 12 bits writes 0 to 4,095. Pillow reads all 16 bits of grey
images, but only the high bytes of others. These are therefore read twice, the second time as if
their bytes were in the other order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Range = tuple[float, float]  # what becomes black, and what becomes white

WHOLE: Range = (0, 2**16 - 1)
AT_ONCE = 2**20  # values that are turned into bytes

# TIFF's tags
BITS, PHOTOMETRIC, WHITE_IS_ZERO, PLANES, SEPARATE = 258, 262, 0, 284, 2


@dataclass(frozen=True)
class SixteenBits:
    """An image: `values` (H, W, 1 or 3), whole numbers; `alpha` (H, W), where it has any."""

    values: NDArray[np.integer]
    alpha: NDArray[np.uint8] | None
    white_is_zero: bool = False

    def extent(self) -> tuple[int, int]:
        """Smallest and largest value outside wholly transparent pixels; (0, 0) without any."""
        visible = self.values if self.alpha is None else self.values[self.alpha > 0]
        return (int(visible.min()), int(visible.max())) if visible.size else (0, 0)

    def as_bytes(self, scale: Range | tuple[()]) -> Image.Image:
        """The image in 8 bits: `scale` becomes 0 to 255, values beyond it are clamped.

        A scale of () stands for `range_of_bits` of the largest value, and raises ValueError where a
        value is below 0.
        """
        pixels = _scaled(self.values, scale or range_of_bits(*self.extent()))
        if self.white_is_zero:
            pixels = 255 - pixels
        if self.alpha is None:
            return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        colours = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        return Image.fromarray(np.concatenate([colours, self.alpha[..., None]], axis=2))


def range_of_bits(smallest: int, largest: int) -> Range:
    """(0, 2^b - 1) with the fewest bits b, at least 8, that hold `largest`.

    Raises ValueError where `smallest` is below 0.
    """
    if smallest < 0:
        raise ValueError(
            f"it has values from {smallest:,} to {largest:,}: name those that are black and white "
            "as data.scale=(low, high)"
        )
    return 0, 2 ** max(8, largest.bit_length()) - 1


def _scaled(values: NDArray, scale: Range) -> NDArray[np.uint8]:
    """round(255 (v - low) / (high - low)), clamped, by a table of all values that occur."""
    (low, high), first = scale, int(values.min())
    table = np.arange(first, int(values.max()) + 1)
    table = np.clip((table - low) * 255 / (high - low), 0, 255).round().astype(np.uint8)
    pixels, rows = np.empty(values.shape, np.uint8), max(1, AT_ONCE // values[:1].size)
    for top in range(0, len(values), rows):  # in parts, since an index takes eight bytes
        pixels[top : top + rows] = table[values[top : top + rows].astype(np.int32) - first]
    return pixels


# --- reading --------------------------------------------------------------------------------------


def may_have_16_bits(image: Image.Image) -> bool:
    """True if the header of `image`, opened and not loaded, has more than 8 bits a channel.

    CMYK images count as 8 bits, since their values use the whole range.
    """
    if image.mode.startswith(("I", "F")):
        return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS, (1,))) > 8 and image.mode != "CMYK"
    return image.format == "PNG" and ";16" in _raw_mode(image.tile[0])


def has_32_bits(image: Image.Image) -> bool:
    """True if the header of `image`, opened and not loaded, has 32 bits a channel."""
    return image.mode == "F" or max(getattr(image, "tag_v2", {}).get(BITS, (16,))) > 16


def read(open_image: Callable[[], Image.Image]) -> SixteenBits | None:
    """The values, upright, of a PNG or TIFF file that `open_image` opens; None if it has 8 bits.

    Raises ValueError where it has more than 16 bits, and any exception where it is damaged.
    """
    image = open_image()
    if not may_have_16_bits(image):
        return None
    if has_32_bits(image):
        kind, dtype = ("floating point", "float32") if image.mode == "F" else ("whole", "int32")
        raise ValueError(
            f"it holds {kind} numbers of 32 bits, whose range is not known: set data.dtype={dtype} "
            "to train on them in their own units, or save them as 8 bits"
        )
    tags = getattr(image, "tag_v2", {})
    is_grey, has_planes = image.mode.startswith("I"), tags.get(PLANES) == SEPARATE
    if has_planes and (image.mode == "I" or not is_grey and image.tile[0].codec_name == "libtiff"):
        raise ValueError("its channels lie one after another in 16 bits: save it as PNG")
    transparent = image.info.get("transparency")  # PNG's tRNS: the value of transparent pixels
    if is_grey:
        values, alpha = _decoded(image, partial(_raw_grey, image))[..., None], None
    elif _raw_mode(image.tile[0]) == "LA;16B":
        stored = _decoded(image, lambda mode: "RGBA").view(">u2")  # four bytes of a pixel
        values, alpha = stored[..., :1], _scaled(stored[..., 1], WHOLE)
    else:
        values, alpha = _from_halves(image, open_image())
    if transparent is not None:
        alpha = np.where((values == transparent).all(-1), 0, 255).astype(np.uint8)
    return SixteenBits(values, alpha, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)


def _raw_grey(image: Image.Image, raw: str) -> str:
    """The raw mode of grey values; Pillow loses the byte order of planes and of libtiff."""
    if raw == "I":
        return image.mode
    if raw == "I;16BS" and image.tile[0].codec_name == "libtiff":
        return "I;16S"
    return raw


def _from_halves(
    image: Image.Image, reopened: Image.Image
) -> tuple[NDArray[np.uint16], NDArray[np.uint8] | None]:
    """RGB values and alpha: the high bytes of `image`, the low ones of the same file `reopened`."""
    modes = {_raw_mode(tile) for tile in image.tile}
    _, _, order = min(modes).partition(";16")  # "L", "B", or "N" for the machine's, "L"
    if not order:  # separate planes R, G and B, which Pillow would read as bytes
        order = "B" if image.tag_v2.prefix == b"MM" else "L"
    order, other_order = ("B", "L") if order == "B" else ("L", "B")

    def read_as(order: str) -> Callable[[str], str]:
        return lambda mode: f"{mode.partition(';')[0].replace('a', 'A')};16{order}"

    values = _decoded(image, read_as(order)).astype(np.uint16)
    values <<= 8
    values |= _decoded(reopened, read_as(other_order))
    if values.shape[2] == 3:
        return values, None
    colours, alpha = values[..., :3], values[..., 3:]
    if any("a" in mode for mode in modes):  # colours are premultiplied by alpha
        colours = colours.astype(np.int64) * WHOLE[1] // np.maximum(alpha, 1)
        colours = np.minimum(colours, WHOLE[1]).astype(np.uint16)
    return colours, _scaled(alpha[..., 0], WHOLE)


def _raw_mode(tile) -> str:
    return tile.args if isinstance(tile.args, str) else tile.args[0]


def _decoded(image: Image.Image, mode: Callable[[str], str]) -> NDArray:
    """The pixels, upright, read as if their raw mode were `mode(raw mode)`."""

    def changed(tile):
        raw = mode(_raw_mode(tile))
        return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))

    image.tile = [changed(tile) for tile in image.tile]
    ImageOps.exif_transpose(image, in_place=True)
    return np.ascontiguousarray(image)
