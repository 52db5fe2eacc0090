"""DDPM (discrete VP) with DDPM++ on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import VP
from configs.networks import DDPMPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VP)
    config.update(DDPMPP)
    config.training.continuous = False
    config.sampling.predictor = "ancestral_sampling"
    return config
