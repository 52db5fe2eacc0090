"""LSUN, 256 x 256. The experiment names the category; other data of this size start here too."""

from ml_collections import ConfigDict

from configs import default


def get_default_config(*parts: dict) -> ConfigDict:
    """Returns the shared default for LSUN, updated with the `parts`."""
    config = default.get_default_config()
    config.data.dataset = "LSUN"
    config.data.image_size = 256
    config.training.batch_size = 64
    config.training.n_iters = 2400001
    config.training.snapshot_freq_for_preemption = 5000
    config.model.dropout = 0.0
    config.model.num_scales = 2000
    config.model.sigma_max = 378.0
    config.sampling.snr = 0.075
    config.eval.begin_ckpt = 50
    config.eval.end_ckpt = 96
    config.eval.batch_size = 512
    config.eval.enable_sampling = True
    return default.updated(config, parts)
