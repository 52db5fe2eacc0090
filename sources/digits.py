"""scikit-learn's scanned digits, which come with the package."""

from functools import cache

import numpy as np
from ml_collections import ConfigDict

from sources.base import Classes, Source, View
from sources.splits import held_out


def open_digits(data: ConfigDict, split: str) -> Source:
    """1,797 images, 8 x 8 grey, by default 180 to test on; the class of a digit is itself."""
    images = np.round(_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    return View(images, np.asarray, held_out(len(images), split, data.held_out), _classes)


open_digits.reads = {"data.held_out": None}


def _classes() -> Classes:
    return Classes(_digits().target.astype(np.int64), tuple("0123456789"))


@cache
def _digits():
    from sklearn.datasets import load_digits

    return load_digits()
