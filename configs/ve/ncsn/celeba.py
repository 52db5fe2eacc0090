"""NCSN on CelebA, 64 x 64.

The published file misspells `training.sde` as `training.loss`; here SMLD sets it.
"""

from configs.default_celeba import ConfigDict, get_default_config
from configs.methods import SMLD
from configs.networks import NCSN


def get_config() -> ConfigDict:
    config = get_default_config(SMLD, NCSN)
    config.model.ema_rate = 0.0
    config.model.num_scales = 10
    config.model.sigma_max = 1.0
    config.sampling.n_steps_each = 100
    config.sampling.snr = 0.316
    return config
