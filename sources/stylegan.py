"""CelebA-HQ and FFHQ from the TFRecord files that StyleGAN's dataset_tool.py writes."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs.schema import Key, Text
from sources import tfrecords
from sources.base import Picture, Source, View
from sources.splits import held_out


def stylegan_image(data: bytes) -> Picture:
    """An image of StyleGAN's TFRecords: `shape`, and `data` as (C, H, W)."""
    features = tfrecords.parse_example(data)
    (pixels,) = features["data"]
    return np.frombuffer(pixels, np.uint8).reshape(features["shape"]).transpose(1, 2, 0)


def open_faces(data: ConfigDict, split: str) -> Source:
    """The images of the file `data.tfrecords_path`; a fixed random share is held out to test on.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    path = Path(data.tfrecords_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.tfrecords_path={path} does not exist; name the -r08 (256 x 256) or -r10 (1024 x "
            f"1024) file that StyleGAN's dataset_tool.py makes of {data.dataset}"
        )
    records = tfrecords.TFRecords([path], stylegan_image)
    index = held_out(len(records), split, data.held_out)
    return View(records, np.asarray, index, digest_of=records.digest_of)


open_faces.keys = {
    "data.tfrecords_path": Key(
        "", Text(), "of CelebAHQ and FFHQ: their TFRecord file", of_machine="file"
    ),
}
open_faces.reads = {"data.held_out": None}
