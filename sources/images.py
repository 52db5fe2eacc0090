"""Images as arrays: decoded from files, cropped and resized as published work does."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sources.base import Picture

Filter = Image.Resampling


def resize(image: Picture, height: int, width: int, kernel: Filter = Filter.BILINEAR) -> Picture:
    """`image` at (height, width); the kernel widens as the image shrinks, against aliasing."""
    if image.shape[:2] == (height, width):
        return image
    squeezed = image[..., 0] if image.shape[2] == 1 else image
    resized = np.asarray(Image.fromarray(squeezed).resize((width, height), kernel))
    return resized.reshape(height, width, image.shape[2])


def center_crop(image: Picture, size: int) -> Picture:
    """The central square of side `size`; of a side that is shorter, all."""
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[max(top, 0) :, max(left, 0) :][:size, :size]


def resized_whole(image: Picture, size: int) -> Picture:
    """All of the image, at (size, size)."""
    return resize(image, size, size)


def cropped_then_resized(image: Picture, size: int) -> Picture:
    """The largest central square, at (size, size) by a bicubic kernel."""
    return resize(center_crop(image, min(image.shape[:2])), size, size, Filter.BICUBIC)


def resized_then_cropped(image: Picture, size: int) -> Picture:
    """The image with its shorter side at `size`, of it the central square."""
    ratio = size / min(image.shape[:2])
    return center_crop(resize(image, *(round(side * ratio) for side in image.shape[:2])), size)


def face(image: Picture, size: int) -> Picture:
    """The central 140 x 140 of a CelebA image, at (size, size)."""
    return resize(center_crop(image, 140), size, size)


def decode_image(data: bytes, channels: int) -> Picture:
    """The pixels of a PNG, JPEG or WebP file, uint8 (H, W, C), upright as EXIF says.

    What is transparent becomes white; 16 bits a channel become 8. `channels` is 1 for grey, 3 for
    RGB, 0 for grey where R = G = B in every pixel and else RGB. Raises anything where the data are
    damaged, or hold more pixels than Pillow allows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        except UnidentifiedImageError as error:
            raise ValueError("no PNG, JPEG or WebP file") from error
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    if channels == 0 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return pixels.reshape(*pixels.shape[:2], -1)
