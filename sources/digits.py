"""scikit-learn's scanned digits, which come with the package."""

import numpy as np

from sources.base import Source, held_out


def open_digits(data, split: str) -> Source:
    """1,797 images, 8 x 8 grey: 1,617 to train, 180 to test on."""
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    return images[held_out(len(images), split)]
