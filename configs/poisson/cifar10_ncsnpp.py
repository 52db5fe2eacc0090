"""PFGM with NCSN++ on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import POISSON
from configs.networks import NCSNPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(POISSON)
    config.update(NCSNPP)
    config.model.ema_rate = 0.999
    config.eval.begin_ckpt = 8
    return config
