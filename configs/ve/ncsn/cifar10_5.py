"""NCSN with technique 5 of NCSNv2 on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import SMLD, SMLD_2019
from configs.networks import NCSN


def get_config() -> ConfigDict:
    return get_default_config(SMLD, NCSN, SMLD_2019)
