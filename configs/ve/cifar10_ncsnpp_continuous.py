"""VE SDE with NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, NCSNPP, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, VE, NCSNPP)
