"""NCSN on CelebA, 64 x 64.

The published file misspells `training.sde` as `training.loss`; here SMLD sets it.
"""

from configs.parts import CELEBA, NCSN, SMLD, SMLD_2019, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CELEBA, SMLD, NCSN, SMLD_2019)
    config.model.ema_rate = 0.0
    return config
