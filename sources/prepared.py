"""Data sets that tensorflow_datasets has prepared on disk; nothing is downloaded."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs.keys import with_home
from configs.schema import Key, OneOf, Text
from sources import digests, images, tfrecords
from sources.base import Classes, PerProcess, Picture, Source, Unreadable, View
from storage.files import one_line


@dataclass(frozen=True)
class Prepared:
    """A `feature` of the examples of a split that was prepared for random access."""

    where: str
    examples: PerProcess
    feature: str = "image"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Picture:
        examples = self.examples()
        try:
            return examples[i][self.feature]
        except Exception as error:  # a damaged record makes the decoder fail in any way
            raise Unreadable(f"{self.where}, image {i}: {one_line(error)}") from error


def encoded_image(data: bytes, channels: int) -> Picture:
    """An image of tensorflow_datasets' TFRecords: a PNG or JPEG file in `image`."""
    (image,) = tfrecords.parse_example(data)["image"]
    return images.decode_image(image, channels)


def stored_label(data: bytes) -> int:
    """The class label of an example of tensorflow_datasets' TFRecords, in `label`."""
    (label,) = tfrecords.parse_example(data)["label"]
    return label


def open_prepared(
    data: ConfigDict,
    split: str,
    name: str,
    prepare: Callable[[Picture, images.ImageSize], Picture],
    test: str = "test",
) -> Source:
    """A data set of tensorflow_datasets, which has to be on disk.

    It may have been prepared for random access (ArrayRecord), or as TFRecords, the default. `name`
    is what tensorflow_datasets calls it, `test` its split to test on, and `prepare` makes an image
    of `data.image_size` of a stored one. Class labels are its feature `label`, if it has one.

    Raises FileNotFoundError where it is not there, which says how to get it; ValueError where
    tensorflow_datasets is not installed.
    """
    builder = _builder(name, data.data_dir)
    stored = "train" if split == "train" else test
    if builder.info.file_format.value == "tfrecord" and stored in builder.info.splits:
        paths = [Path(path) for path in builder.info.splits[stored].filepaths]
        source = tfrecords.TFRecords(paths, partial(encoded_image, channels=data.num_channels))
        read_label, digest_of = partial(source.parsed, parse=stored_label), source.digest_of
    else:
        opened = PerProcess(partial(_data_source, name, stored, data.data_dir))
        source = Prepared(f"{name} ({stored})", opened)
        undecoded = PerProcess(partial(_data_source, name, stored, data.data_dir, decoded=False))
        read_label = Prepared(source.where, undecoded, "label").__getitem__
        digest_of = partial(digests.of_words, _files(builder.info, stored))
    try:
        index = np.arange(len(source))
    except (NotImplementedError, OSError, LookupError) as error:
        root = str(builder.data_path).removesuffix(f"/{name}/{builder.version}")
        raise FileNotFoundError(
            f"{name} is not in {builder.data_path}. Where there is a network, run: python3 -c "
            f"\"import tensorflow_datasets as tfds; tfds.data_source('{name}', data_dir='{root}')\""
            " and copy the folder here, or name another folder as data.data_dir"
        ) from error
    classes = None
    if "label" in builder.info.features:
        names = tuple(builder.info.features["label"].names)
        classes = partial(_classes, read_label, len(source), names)
    return View(source, images.to_size(prepare, data.image_size), index, classes, digest_of)


open_prepared.keys = {
    "data.data_dir": Key(
        "",
        Text(),
        "where other data lie; '' for the default folder of the data set",
        of_machine="file",
    ),
}


def _files(info, stored: str) -> list[str]:
    """Name and version of a data set, and the files of the split `stored` with their sizes."""
    paths = info.splits[stored].filepaths if stored in info.splits else []
    sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path in paths]
    return [info.full_name, *(f"{Path(p).name} {n}" for p, n in zip(paths, sizes, strict=True))]


def _classes(read_label: Callable[[int], int], n: int, names: tuple[str, ...]) -> Classes:
    labels = np.full(n, -1, np.int64)
    for i in range(n):
        with contextlib.suppress(Unreadable):  # a warning names it when its image is read
            labels[i] = read_label(i)
    return Classes(labels, names)


def _data_source(name: str, split: str, data_dir: str, decoded: bool = True):
    import tensorflow_datasets as tfds

    decoders = None if decoded else {"image": tfds.decode.SkipDecoding()}
    return _builder(name, data_dir).as_data_source(split, decoders=decoders)


def _builder(name: str, data_dir: str):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"{name} is read by tensorflow_datasets: pip install -r requirements.txt ({error})"
        ) from error
    return tfds.builder(name, data_dir=with_home("data.data_dir", data_dir) or None)


def open_lsun(data: ConfigDict, split: str) -> Source:
    """The LSUN category `data.category`, cut as published for its size."""
    if data.category not in ("bedroom", "church_outdoor"):
        raise ValueError(f"data.category={data.category!r}; known: bedroom, church_outdoor")
    wide = data.image_size == 128
    prepare = images.resized_then_cropped if wide else images.cropped_then_resized
    return open_prepared(data, split, f"lsun/{data.category}", prepare, "validation")


open_lsun.keys = open_prepared.keys | {
    "data.category": Key("", OneOf(("", "bedroom", "church_outdoor")), "category of LSUN"),
}
