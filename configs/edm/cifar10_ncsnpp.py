"""EDM, with EDM's NCSN++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import EDM, EDM_TRAINING
from configs.networks import EDM_NCSNPP


def get_config() -> ConfigDict:
    return get_default_config(EDM, EDM_NCSNPP, EDM_TRAINING)
