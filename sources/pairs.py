"""Conditions that are images: what a network is given of each image, such as a measurement.

The conditions of the data at `data.path` lie at `data.condition_path`. They have the sides of the
images, any number of channels and any type of numbers, and belong to the images of the same names
or, where either have no names, of the same place in the order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from configs.keys import shown, with_home
from configs.schema import Key, Number, Numbers, OneOf, Text, whole
from sources import digests, moments
from sources.arrays import Arrays, is_array, read_numbers
from sources.base import Unreadable, View
from sources.codec import Codec, EightBitImages, encoded
from sources.dtypes import DTYPES, tensor_of
from sources.folder import Folder, read_images
from sources.images import Size, sides_of
from sources.loaded import Loaded
from sources.measured_arrays import MOST_CHANNELS, MeasuredArrays
from sources.rules import NEWEST, RULES
from sources.sizes import shapes_of

PATH = "data.condition_path"
EIGHT_BITS, SIXTEEN_BITS = "uint8", "uint16"
LOOKED_AT = 64  # conditions of which channels and sides are measured

_NUMBER = Number(-1e30, 1e30)

KEYS = {
    PATH: Key(
        "",
        Text(),
        "of 'folder': conditions of the images, which the network is given as further channels: a "
        "folder, .zip, .npy or .npz, of the images' sides, matched by name or by order",
        of_machine="file",
    ),
    "data.condition_channels": Key(
        0, whole(0, MOST_CHANNELS), "channels of the conditions; 0: as many as they have"
    ),
    "data.condition_dtype": Key(
        "",
        OneOf(("", EIGHT_BITS, *DTYPES)),
        "type of the conditions' numbers; 'uint8': images of 8 bits; '': that of the files; for "
        "16-bit image files 'uint16', or 'uint8' where data.scale makes 8-bit images of the data",
    ),
    "data.condition_mean": Key(
        (),
        Numbers(_NUMBER, range(MOST_CHANNELS + 1)),
        "of the conditions: the number in each channel that becomes 0; (): measured, 127.5 for 8 "
        "bits",
    ),
    "data.condition_std": Key(
        (),
        Numbers(Number(1e-30, 1e30), range(MOST_CHANNELS + 1)),
        "of the conditions: the difference in each channel that becomes 0.5; (): measured, 63.75 "
        "for 8 bits",
    ),
}
MEASURED = [key for key in KEYS if key != PATH]


def codec_of(data: ConfigDict, sides: Size | None = None) -> Codec | None:
    """Codec of the conditions of a config's `data`; None where there are no conditions.

    `sides` are (H, W) of the conditions, by default those of the data or of its patches.
    Raises ValueError where the codec's numbers are still open, or are set for images of 8 bits.
    """
    if not data.condition_channels:
        if data.condition_path:
            raise ValueError(f"{PATH}: its channels are open: training measures them at its start")
        return None
    shape = data.condition_channels, *(sides or sides_of(tuple(data.patch) or data.image_size))
    numbers = tuple(data.condition_mean), tuple(data.condition_std)
    if data.condition_dtype in ("", EIGHT_BITS):
        _, *of_images = _of_eight_bits(data.condition_channels)
        for key, value, number in zip(MEASURED[2:], numbers, of_images, strict=True):
            if value not in ((), number):
                raise ValueError(
                    f"{key}={value} is for conditions in units of their own, but these are images "
                    f"of 8 bits, for which it is {number}: leave it open"
                )
        return EightBitImages(shape)
    if not all(len(each) == data.condition_channels for each in numbers):
        raise ValueError(
            f"data.condition_mean and data.condition_std must have {data.condition_channels} "
            f"numbers each (data.condition_channels), not {len(numbers[0])} and {len(numbers[1])}"
        )
    return MeasuredArrays(shape, data.condition_dtype, *numbers)


def _of_eight_bits(channels: int) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """Type, mean and standard deviation of conditions that are images of 8 bits."""
    return EIGHT_BITS, (127.5,) * channels, (63.75,) * channels


def is_alike(condition: Codec, image: Codec) -> bool:
    """True where conditions have the channels, sides and units of the images."""
    same = condition.data_shape == image.data_shape
    return same and (condition.dtype == "uint8") == (image.dtype == "uint8")


def _bounds(scale: tuple[float, ...] | str) -> tuple[float, ...]:
    """Numbers that `data.scale` makes black and white; () where it says how arrays are measured."""
    return () if isinstance(scale, str) else tuple(scale)


def read_conditions(
    key: str, name: str, codec: Codec, scale: tuple[float, ...] | str, layout: str
) -> dict[str, NDArray]:
    """Conditions of the file or folder `name`, the value of `key`: (H, W, C) as stored, by name.

    Args:
        codec: of the conditions, with the sides that they must have.
        scale, layout: values of `data.scale` and `data.layout`.

    Raises:
        ValueError: one has another shape, is not finite, or cannot be read.
        OSError: there is no such file.
    """
    channels, *sides = codec.data_shape
    dtype = "" if codec.dtype == EIGHT_BITS else codec.dtype
    if dtype and is_array(Path(name)):
        return read_numbers(key, Path(name), (*sides, channels), layout)
    images = read_images(key, name, channels, _bounds(scale), dtype)
    for each, image in images.items():
        if image.shape != (*sides, channels):
            raise ValueError(
                f"{key}: {each} is {image.shape} (H, W, C), and the network is given conditions of "
                f"{(*sides, channels)}"
            )
    return images


@dataclass(frozen=True)
class EncodedConditions:
    """Conditions (H, W, C) of a split as the network is given them, float32.

    One of another shape than the `codec` has is `Unreadable`.
    """

    source: View
    codec: Codec

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> NDArray[np.float32]:
        image, (channels, *sides) = self.source[i], self.codec.data_shape
        if image.shape != (*sides, channels):
            raise Unreadable(
                f"the condition of image {i} is {image.shape} (H, W, C), not {(*sides, channels)}"
            )
        stored = tensor_of(np.stack([image]))
        return encoded(self.codec, stored)[0].permute(1, 2, 0).contiguous().numpy()

    def digest(self) -> str:
        """The digest of the conditions as stored, and of the codec."""
        return digests.joined(digests.of_source(self.source), self.codec.identity)


class Pairs:
    """The conditions at `data.condition_path`, listed once for both splits.

    Args:
        data: a config's `data`.
        images: those at `data.path`.

    Raises:
        ValueError: there are no conditions, or no images that they could belong to.
        FileNotFoundError: `data.condition_path` does not exist.
    """

    def __init__(self, data: ConfigDict, images: "Folder | Arrays | Loaded"):
        self._name, self._images = data.condition_path, images
        path = Path(with_home(PATH, data.condition_path))
        if not path.exists():
            raise FileNotFoundError(f"{PATH}={data.condition_path} does not exist")
        rules = RULES[data.rules or NEWEST]
        self._files = Arrays(path, rules, PATH) if is_array(path) else Folder(path, rules, PATH)

    def dtype(self, data: ConfigDict) -> str:
        """Name of the type of conditions in units of their own; "" for images of 8 bits.

        For image files the type is `data.condition_dtype`. Where that is open, files of 16 bits
        become images of 8 bits if the data do, by the same `data.scale`.
        """
        if isinstance(self._files, Arrays):
            return self._files.dtype()
        if data.condition_dtype:
            return data.condition_dtype if data.condition_dtype != EIGHT_BITS else ""
        are_scaled = _bounds(data.scale) and not data.dtype
        return SIXTEEN_BITS if self._have_16_bits and not are_scaled else ""

    @property
    def _have_16_bits(self) -> bool:
        return isinstance(self._files, Folder) and self._files.files.have_16_bits

    def clipping(self, data: ConfigDict) -> str:
        """The end of a log line on 16-bit conditions beyond `data.scale`; "" where none are."""
        if self.dtype(data) or not self._have_16_bits:
            return ""
        high = _bounds(data.scale)[1]
        highest = max(self._files.measure_scale().scale, default=0)
        if highest <= high:
            return ""
        return f"; clipped at {high:g}, though they reach {highest:g}: widen data.scale"

    def of_split(self, data: ConfigDict, split: str, images: View) -> View:
        """The conditions, as stored, of `images`, those of `split`.

        Raises ValueError where there is not one for each image, or not of the images' sides.
        """
        dtype, bounds = self.dtype(data), _bounds(data.scale)
        if data.condition_dtype and (data.condition_dtype == EIGHT_BITS) != (not dtype):
            raise ValueError(
                f"{PATH}={self._name} holds {dtype or EIGHT_BITS}, not {data.condition_dtype} "
                "(data.condition_dtype)"
            )
        if self._have_16_bits and not (dtype or bounds):
            raise ValueError(
                f"{PATH}={self._name} holds 16-bit images: to make 8-bit ones of them "
                "(data.condition_dtype), set data.scale=(low, high), the values of black and "
                "white; to keep their units, set data.condition_dtype='uint16'"
            )
        options = data.copy_and_resolve_references()
        with options.ignore_type():
            options.update(num_channels=data.condition_channels, image_size=0)
            options.update(num_classes=0, held_out=0, groups="")
            options.dtype = dtype if isinstance(self._files, Folder) else ""
            options.scale = bounds
        has_splits = bool(self._files.split_names) and isinstance(self._files, Arrays)
        of_each_split = bool(self._images.split_names) and not isinstance(self._images, Folder)
        if has_splits != of_each_split:
            which = "images" if of_each_split else "conditions"
            raise ValueError(
                f"{PATH}={self._name}: only the {which} have splits of their own; conditions by "
                "order need the splits of the images"
            )
        conditions = self._files.open(options, split)
        if isinstance(self._files, Folder):
            conditions = replace(conditions, index=np.arange(len(self._files.names)))
        numbers = self._numbers(len(conditions.source), len(images.source), split * of_each_split)
        conditions = replace(conditions, index=numbers[images.index])
        _check_sides(f"{PATH}={self._name}", conditions, data)
        return conditions

    def _numbers(self, conditions: int, images: int, split: str) -> NDArray[np.int64]:
        """The number of the condition of each image, of as many `conditions` and `images`."""
        if conditions != images:
            of_split = f" (array {split})" if split else ""
            raise ValueError(
                f"{PATH}={self._name} holds {conditions:,} conditions for {images:,} images"
                f"{of_split}: each image needs one"
            )
        if not (isinstance(self._files, Folder) and isinstance(self._images, Folder)):
            return np.arange(images)
        by_name = {name: i for i, name in enumerate(_bare(self._files.names))}
        names = _bare(self._images.names)
        if missing := [name for name in names if name not in by_name]:
            raise ValueError(
                f"{PATH}={self._name} has no file called {shown(missing[0])}, whatever its suffix, "
                f"as {len(missing):,} of {images:,} images have none of their name: conditions "
                "have the names of their images"
            )
        return np.array([by_name[name] for name in names])


def _check_sides(where: str, conditions: View, data: ConfigDict) -> None:
    """Raise ValueError where conditions have other sides than the images of `data`."""
    sides = sides_of(data.image_size)
    for height, width, _ in shapes_of(conditions, LOOKED_AT) if data.image_size else ():
        if (height, width) != tuple(sides):
            raise ValueError(
                f"{where} has conditions of {height} x {width} pixels, and the images have "
                f"{sides[0]} x {sides[1]} (data.image_size): conditions are not resized"
            )


def _bare(names: Sequence[str]) -> list[str]:
    """`names` without suffixes, and without the one folder in which all of them lie."""
    paths = [PurePosixPath(name).with_suffix("") for name in names]
    tops = {path.parts[0] for path in paths}
    if len(tops) == 1 and all(len(path.parts) > 1 for path in paths):
        paths = [path.relative_to(*tops) for path in paths]
    return [*map(str, paths)]


def measure(conditions: View, dtype: str, watch: Callable) -> tuple[dict[str, Any], str]:
    """Measure the conditions of the training split; return values by key, and a line for the log.

    `dtype` is that of `Pairs`; `watch` shows progress.
    """
    channels = max(shape[2] for shape in shapes_of(conditions, LOOKED_AT))
    values = _of_eight_bits(channels)
    line = f"conditions: {channels} channel{'s' * (channels > 1)} of 8 bits, from -1 to 1"
    if dtype:
        measured = moments.measure(conditions, "channels", watch)
        values = dtype, measured.mean, measured.std
        line = f"conditions of {dtype}: {measured.line.partition('; pictures')[0]}"
    return dict(zip(MEASURED, (channels, *values), strict=True)), line
