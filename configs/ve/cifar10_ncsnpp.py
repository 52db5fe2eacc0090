"""SMLD (discrete VE) with NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, NCSNPP_POSITIONAL, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, VE, NCSNPP_POSITIONAL)
    config.training.continuous = False
    return config
