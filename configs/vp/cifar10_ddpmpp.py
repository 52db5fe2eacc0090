"""DDPM (discrete VP) with DDPM++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VP
from configs.networks import DDPMPP


def get_config() -> ConfigDict:
    config = get_default_config(VP, DDPMPP)
    config.training.continuous = False
    config.sampling.predictor = "ancestral_sampling"
    return config
