"""scikit-learn's scanned digits, which come with the package."""

from functools import cache
from importlib.metadata import distribution

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from sources.base import Classes, Source, View
from sources.splits import held_out


def open_digits(data: ConfigDict, split: str) -> Source:
    """1,797 images, 8 x 8 grey, by default 180 to test on; the class of a digit is itself."""
    images = np.round(_digits()[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return View(images, np.asarray, held_out(len(images), split, data.held_out), _classes)


open_digits.reads = {"data.held_out": None}


def _classes() -> Classes:
    return Classes(_digits()[:, -1], tuple("0123456789"))


@cache
def _digits() -> NDArray:
    """Rows (1797, 65): the 64 pixels of a digit, from 0 to 16, and its class.

    The file is read without importing scikit-learn, which would take a third of a program's start.
    """
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    return np.loadtxt(path, delimiter=",", dtype=np.int64)
