"""CelebA, 64 x 64."""

import ml_collections

from configs import default


def get_default_config() -> ml_collections.ConfigDict:
    """Returns the shared default with the data and schedule of CelebA."""
    config = default.get_default_config()
    config.data.dataset = "CELEBA"
    config.data.image_size = 64
    config.training.M = 291
    config.model.sigma_max = 90.0
    config.sampling.snr = 0.17
    config.sampling.z_max = 60.0
    config.sampling.z_exp = 1.0
    config.sampling.upper_norm = 6000.0
    config.eval.enable_sampling = True
    return config
