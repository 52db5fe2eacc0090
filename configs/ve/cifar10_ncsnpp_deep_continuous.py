"""VE SDE with the deep NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, DEEP, NCSNPP, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, VE, NCSNPP, DEEP)
