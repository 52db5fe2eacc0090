"""NCSNv2 on LSUN bedrooms, 128 x 128.

The published file misspells `training.continuous = False`, so its training is continuous, which
a network of discrete noise levels cannot follow; here SMLD sets it.
"""

from configs.parts import LSUN, NCSNV2_128, SMLD, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, SMLD, NCSNV2_128)
    config.data.category = "bedroom"
    config.data.image_size = 128
    config.training.batch_size = 128
    config.optim.lr = 1e-4
    config.model.ema_rate = 0.9999
    config.model.num_scales = 1086
    config.model.sigma_max = 190.0
    config.sampling.n_steps_each = 3
    config.sampling.snr = 0.095
    return config
