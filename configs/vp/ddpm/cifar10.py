"""DDPM on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import VP
from configs.networks import DDPM


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VP)
    config.update(DDPM)
    config.training.continuous = False
    config.sampling.predictor = "ancestral_sampling"
    return config
