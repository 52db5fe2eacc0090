"""NCSN on CelebA, 64 x 64.

The published file misspells `training.sde` as `training.loss`; here SMLD sets it.
"""

from configs.default_celeba import ConfigDict, get_default_config
from configs.methods import SMLD, SMLD_2019
from configs.networks import NCSN


def get_config() -> ConfigDict:
    config = get_default_config(SMLD, NCSN, SMLD_2019)
    config.model.ema_rate = 0.0
    return config
