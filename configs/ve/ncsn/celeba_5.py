"""NCSN with technique 5 of NCSNv2 on CelebA, 64 x 64."""

from configs.default_celeba import ConfigDict, get_default_config
from configs.methods import SMLD, SMLD_2019
from configs.networks import NCSN


def get_config() -> ConfigDict:
    return get_default_config(SMLD, NCSN, SMLD_2019)
