"""DDPM on CIFAR-10 with a network that does not see the time."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VP_DISCRETE
from configs.networks import DDPM


def get_config() -> ConfigDict:
    config = get_default_config(VP_DISCRETE, DDPM)
    config.model.conditional = False
    return config
