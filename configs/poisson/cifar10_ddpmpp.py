"""PFGM with DDPM++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import POISSON
from configs.networks import DDPMPP


def get_config() -> ConfigDict:
    config = get_default_config(POISSON, DDPMPP)
    config.eval.begin_ckpt = 8
    return config
