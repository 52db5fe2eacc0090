"""sub-VP SDE with the network of DDPM on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import SUBVP
from configs.networks import DDPM


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(SUBVP)
    config.update(DDPM)
    return config
