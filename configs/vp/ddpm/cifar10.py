"""DDPM on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VP
from configs.networks import DDPM


def get_config() -> ConfigDict:
    config = get_default_config(VP, DDPM)
    config.training.continuous = False
    config.sampling.predictor = "ancestral_sampling"
    return config
