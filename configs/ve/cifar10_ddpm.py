"""SMLD (discrete VE) with the network of DDPM on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import VE
from configs.networks import DDPM


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VE)
    config.update(DDPM)
    config.training.continuous = False
    return config
