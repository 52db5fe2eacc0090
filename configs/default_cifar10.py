"""CIFAR-10, 32 x 32."""

from ml_collections import ConfigDict

from configs import default


def get_default_config(*parts: dict) -> ConfigDict:
    """Returns the shared default for CIFAR-10, updated with the `parts`."""
    config = default.get_default_config()
    config.data.dataset = "CIFAR10"
    config.data.image_size = 32
    config.training.M = 291
    config.model.sigma_max = 50.0
    config.sampling.z_max = 40.0
    config.sampling.z_exp = 5.0
    config.sampling.upper_norm = 3000.0
    config.eval.begin_ckpt = 9
    return default.updated(config, parts)
