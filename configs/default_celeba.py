"""CelebA, 64 x 64."""

from ml_collections import ConfigDict

from configs import default


def get_default_config(*parts: dict) -> ConfigDict:
    """Returns the shared default for CelebA, updated with the `parts`."""
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
    return default.updated(config, parts)
