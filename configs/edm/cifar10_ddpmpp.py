"""EDM, with EDM's DDPM++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import EDM, EDM_TRAINING
from configs.networks import EDM_DDPMPP


def get_config() -> ConfigDict:
    return get_default_config(EDM, EDM_DDPMPP, EDM_TRAINING)
