"""DDPM (discrete VP) with NCSN++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VP
from configs.networks import NCSNPP


def get_config() -> ConfigDict:
    config = get_default_config(VP, NCSNPP)
    config.training.continuous = False
    config.model.embedding_type = "positional"
    config.sampling.predictor = "reverse_diffusion"
    return config
