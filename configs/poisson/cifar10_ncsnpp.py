"""PFGM with NCSN++ on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import POISSON
from configs.networks import NCSNPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(POISSON)
    config.update(NCSNPP)
    config.training.model = "nscnpp"  # spelled so where it was published
    config.model.ema_rate = 0.999
    config.model.z_max = 40.0  # nothing reads these two, but sampling.z_max and z_min
    config.model.z_min = 0.01
    return config
