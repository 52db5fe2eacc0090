"""Images as arrays: decoded from files, cropped and resized as published work does."""

import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import IO, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sources import sixteen_bits
from sources.base import Picture
from sources.dtypes import is_whole, limits
from sources.sixteen_bits import Range
from storage.files import may_unpack_to

Filter = Image.Resampling

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # as Pillow names them
SWAPPED = (5, 6, 7, 8)  # values of EXIF's orientation where height and width are swapped

Size = tuple[int, int]  # height and width
ImageSize = int | Size  # a value of `data.image_size`; one number for a square
Shape = tuple[int, int, int]  # channels, height, width


def sides_of(image_size: ImageSize) -> Size:
    """Height and width that a value of `data.image_size` stands for."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def image_size_of(sides: Size) -> ImageSize:
    """The value of `data.image_size` for height and width, `sides`."""
    return sides[0] if sides[0] == sides[1] else tuple(sides)


def shape_of(data: ConfigDict) -> Shape:
    """(C, H, W) that a config's `data` states; ValueError where it is not decided yet."""
    for key in ("num_channels", "image_size"):
        if not data[key]:
            raise ValueError(f"data.{key} is open: training measures it at its first start")
    return data.num_channels, *sides_of(tuple(data.patch) or data.image_size)


class Header(NamedTuple):
    """An image's `size`, upright as EXIF says, and whether it `may_have_16_bits` a channel."""

    size: Size
    may_have_16_bits: bool


def resize(image: Picture, height: int, width: int, kernel: Filter = Filter.BILINEAR) -> Picture:
    """`image` (H, W, C) resized to (height, width), each channel by itself.

    The kernel widens as the image shrinks, against aliasing.
    """
    if image.shape[:2] == (height, width):
        return image
    # Channels are resized one by one: Pillow would treat the last one of two or four as alpha.
    planes = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    resized = [Image.fromarray(plane).resize((width, height), kernel) for plane in planes]
    return np.dstack([np.asarray(plane) for plane in resized])


def center_crop(image: Picture, size: ImageSize) -> Picture:
    """The centre of the image, of `size`; of a side that is shorter, all."""
    height, width = sides_of(size)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[max(top, 0) :, max(left, 0) :][:height, :width]


def largest_part(original: Size, size: ImageSize) -> Size:
    """Height and width of the largest part of an image of `original` in the ratio of `size`."""
    scale = min(old / new for old, new in zip(original, sides_of(size), strict=True))
    return tuple(max(1, round(scale * side)) for side in sides_of(size))


def resized_whole(image: Picture, size: ImageSize) -> Picture:
    """All of the image, at `size`."""
    return resize(image, *sides_of(size))


def cropped_then_resized(
    image: Picture, size: ImageSize, kernel: Filter = Filter.BICUBIC
) -> Picture:
    """The largest central part in the ratio of `size`, resized."""
    part = center_crop(image, largest_part(image.shape[:2], size))
    return resize(part, *sides_of(size), kernel)


def resized_then_cropped(image: Picture, size: ImageSize) -> Picture:
    """The centre, of `size`, of the image resized so that it just covers that."""
    original = image.shape[:2]
    ratio = max(new / old for new, old in zip(sides_of(size), original, strict=True))
    return center_crop(resize(image, *(round(side * ratio) for side in original)), size)


def face(image: Picture, size: ImageSize) -> Picture:
    """The central 140 x 140 of a CelebA image, cut to the ratio of `size` and resized."""
    return cropped_then_resized(center_crop(image, 140), size, Filter.BILINEAR)


def to_size(
    prepare: Callable[[Picture, ImageSize], Picture], size: ImageSize
) -> Callable[[Picture], Picture]:
    """`prepare` for one `size`; where that is 0, as the data have, images stay as they are."""
    return partial(prepare, size=size) if size else np.asarray


def open_image(file: IO[bytes]) -> Image.Image:
    """An image of `FORMATS`, not yet loaded: the first page of a TIFF, the first frame of a GIF.

    Raises ValueError where it is none, and other errors where the header is damaged or claims more
    pixels than Pillow allows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            kinds = "no PNG, JPEG or WebP file, nor a BMP, TIFF or GIF of a usual kind"
            raise ValueError(f"{kinds}: save it as PNG") from error


def read_header(file: IO[bytes]) -> Header:
    """The header of an image file, of which no pixels are read; raises as `open_image`."""
    image = open_image(file)
    width, height = image.size
    # a PNG may have its EXIF after the pixels
    swapped = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation) in SWAPPED
    size = (width, height) if swapped else (height, width)
    return Header(size, sixteen_bits.may_have_16_bits(image))


def decode_image(data: bytes, channels: int, scale: Range | tuple[()] = ()) -> Picture:
    """The pixels of a file of `FORMATS`, uint8 (H, W, C), upright as EXIF says.

    CMYK becomes RGB, and transparent pixels become white. In images of 16 bits a channel, values
    from low to high of `scale` become 0 to 255; () stands for the range of as many bits as the
    file's largest value needs (see `sixteen_bits`). `channels` is 1 for grey, 3 for RGB, and 0 for
    grey where R = G = B in every pixel, else RGB. Raises any exception where the data are damaged,
    have more than 16 bits, or more pixels than Pillow allows.
    """
    deep = sixteen_bits.read(partial(_opened, data))
    image = deep.as_bytes(scale) if deep else _opened(data)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "LAB":
        image = image.convert("RGB")  # Pillow converts this to grey
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    if channels == 0 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return pixels.reshape(*pixels.shape[:2], -1)


def decode_numbers(data: bytes, channels: int, dtype: str) -> NDArray:
    """The values of a file of `FORMATS` as they are stored, (H, W, C) of `dtype`, upright.

    Values have 8 or 16 bits, or 32 in a TIFF; `channels` is 1, 3, or 0 for as many as there are.
    Raises ValueError for another number of channels, transparency, or values that `dtype` does not
    hold, and any exception where the data are damaged.
    """
    image = _opened(data)
    if image.has_transparency_data:
        raise ValueError("its transparent pixels have no value: save it without transparency")
    if sixteen_bits.has_32_bits(image):
        values = np.asarray(ImageOps.exif_transpose(image))[..., None]
    elif deep := sixteen_bits.read(partial(_opened, data)):
        values = deep.values
    else:
        image = ImageOps.exif_transpose(image)
        values = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
        values = values.reshape(*values.shape[:2], -1)
    if channels not in (0, values.shape[2]):
        raise ValueError(
            f"its channels are {values.shape[2]}, not {channels} (data.num_channels, or "
            "data.condition_channels for conditions)"
        )
    low, high = limits(dtype)
    if values.min() < low or values.max() > high or values.dtype.kind == "f" and is_whole(dtype):
        extent = f"{values.min():,} to {values.max():,}"
        raise ValueError(
            f"its values, {values.dtype} from {extent}, are not of the type {dtype} (data.dtype, "
            "or data.condition_dtype for conditions)"
        )
    return values.astype(dtype)


def extent_of_16_bits(data: bytes) -> tuple[int, int]:
    """Smallest and largest value of the file of a 16-bit image; (0, 0) where it has 8 bits.

    Raises as `decode_image`.
    """
    deep = sixteen_bits.read(partial(_opened, data))
    return deep.extent() if deep else (0, 0)


def _opened(data: bytes) -> Image.Image:
    image = open_image(io.BytesIO(data))
    refuse_bomb(image, len(data))
    return image


def refuse_bomb(image: Image.Image, size: int) -> None:
    """Raise ValueError where an image of a file of `size` bytes, not yet loaded, is no picture.

    A kilobyte can hold a million pixels of one colour; so many are decoded only of larger files.
    """
    width, height = image.size
    if 4 * width * height > may_unpack_to(size):
        raise ValueError(
            f"{width:,} x {height:,} pixels are too many for {size:,} bytes: save it smaller"
        )
