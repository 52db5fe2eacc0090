"""sub-VP SDE with the deep DDPM++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import SUBVP
from configs.networks import DDPMPP, DEEP


def get_config() -> ConfigDict:
    return get_default_config(SUBVP, DDPMPP, DEEP)
