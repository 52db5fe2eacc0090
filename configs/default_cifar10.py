"""CIFAR-10, 32 x 32."""

import ml_collections

from configs import default


def get_default_config() -> ml_collections.ConfigDict:
    """Returns the shared default with the data and schedule of CIFAR-10."""
    config = default.get_default_config()
    config.data.dataset = "CIFAR10"
    config.data.image_size = 32
    return config
