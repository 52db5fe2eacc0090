"""SMLD (discrete VE) with NCSN++ on CelebA, 64 x 64."""

import ml_collections

from configs.default_celeba import get_default_config
from configs.methods import VE
from configs.networks import NCSNPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VE)
    config.update(NCSNPP)
    config.training.continuous = False
    config.model.embedding_type = "positional"
    return config
