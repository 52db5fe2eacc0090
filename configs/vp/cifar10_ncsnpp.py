"""DDPM (discrete VP) with NCSN++ on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import VP
from configs.networks import NCSNPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VP)
    config.update(NCSNPP)
    config.training.continuous = False
    config.model.embedding_type = "positional"
    config.sampling.predictor = "reverse_diffusion"
    return config
