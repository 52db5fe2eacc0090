"""sub-VP SDE with DDPM++ on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import SUBVP
from configs.networks import DDPMPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(SUBVP)
    config.update(DDPMPP)
    return config
