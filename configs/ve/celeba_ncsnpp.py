"""SMLD (discrete VE) with NCSN++ on CelebA, 64 x 64."""

from configs.parts import CELEBA, NCSNPP_POSITIONAL, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CELEBA, VE, NCSNPP_POSITIONAL)
    config.training.continuous = False
    return config
