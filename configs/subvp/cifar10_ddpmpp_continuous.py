"""sub-VP SDE with DDPM++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import SUBVP
from configs.networks import DDPMPP


def get_config() -> ConfigDict:
    return get_default_config(SUBVP, DDPMPP)
