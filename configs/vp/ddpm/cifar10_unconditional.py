"""DDPM on CIFAR-10 with a network that does not see the time."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VP
from configs.networks import DDPM


def get_config() -> ConfigDict:
    config = get_default_config(VP, DDPM)
    config.training.continuous = False
    config.model.conditional = False
    config.sampling.predictor = "ancestral_sampling"
    return config
