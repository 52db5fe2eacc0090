"""VP SDE with the deep DDPM++ on CIFAR-10."""

from configs.parts import CIFAR10, DDPMPP, DEEP, VP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, VP, DDPMPP, DEEP)
