"""SMLD (discrete VE) with NCSN++ on CelebA, 64 x 64."""

from configs.default_celeba import ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import NCSNPP


def get_config() -> ConfigDict:
    config = get_default_config(VE, NCSNPP)
    config.training.continuous = False
    config.model.embedding_type = "positional"
    return config
