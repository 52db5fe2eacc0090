"""CelebA-HQ and FFHQ, 1024 x 1024. The experiment names the data set and its file."""

from ml_collections import ConfigDict

from configs import default, default_lsun


def get_default_config(*parts: dict) -> ConfigDict:
    """Returns LSUN's default, changed for faces of 1024 x 1024 and updated with the `parts`."""
    config = default_lsun.get_default_config()
    config.data.image_size = 1024
    config.training.batch_size = 8
    config.model.sigma_max = 1348.0
    config.sampling.snr = 0.15
    config.eval.begin_ckpt = 1
    config.eval.batch_size = 1024
    return default.updated(config, parts)
