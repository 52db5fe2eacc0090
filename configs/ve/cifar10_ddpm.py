"""SMLD (discrete VE) with the network of DDPM on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import DDPM


def get_config() -> ConfigDict:
    config = get_default_config(VE, DDPM)
    config.training.continuous = False
    return config
