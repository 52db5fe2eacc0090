"""VE SDE with the deep NCSN++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import DEEP, NCSNPP


def get_config() -> ConfigDict:
    return get_default_config(VE, NCSNPP, DEEP)
