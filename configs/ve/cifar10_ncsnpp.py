"""SMLD (discrete VE) with NCSN++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import NCSNPP


def get_config() -> ConfigDict:
    config = get_default_config(VE, NCSNPP)
    config.training.continuous = False
    config.model.embedding_type = "positional"
    return config
