"""CIFAR-10, 32 x 32."""

import ml_collections

from configs import default


def get_default_config() -> ml_collections.ConfigDict:
    """Returns the shared default with the data and schedule of CIFAR-10."""
    config = default.get_default_config()
    config.data.dataset = "CIFAR10"
    config.data.image_size = 32
    config.training.M = 291
    config.model.sigma_max = 50.0
    config.sampling.z_max = 40.0
    config.sampling.z_exp = 5.0
    config.sampling.upper_norm = 3000.0
    config.eval.begin_ckpt = 9
    return config
