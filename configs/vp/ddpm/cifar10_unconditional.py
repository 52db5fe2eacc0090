"""DDPM on CIFAR-10 with a network that does not see the time."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import VP
from configs.networks import DDPM


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VP)
    config.update(DDPM)
    config.training.continuous = False
    config.model.conditional = False
    config.sampling.predictor = "ancestral_sampling"
    return config
