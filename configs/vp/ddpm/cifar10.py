"""DDPM on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VP_DISCRETE
from configs.networks import DDPM


def get_config() -> ConfigDict:
    return get_default_config(VP_DISCRETE, DDPM)
