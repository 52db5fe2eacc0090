"""sub-VP SDE with DDPM++ on CIFAR-10."""

from configs.parts import CIFAR10, DDPMPP, SUBVP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, SUBVP, DDPMPP)
