"""PFGM with NCSN++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import POISSON
from configs.networks import NCSNPP


def get_config() -> ConfigDict:
    config = get_default_config(POISSON, NCSNPP)
    config.model.ema_rate = 0.999
    config.eval.begin_ckpt = 8
    return config
