"""sub-VP SDE with the deep DDPM++ on CIFAR-10."""

from configs.parts import CIFAR10, DDPMPP, DEEP, SUBVP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, SUBVP, DDPMPP, DEEP)
