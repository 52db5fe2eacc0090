"""DDPM (discrete VP) with DDPM++ on CIFAR-10."""

from configs.parts import CIFAR10, DDPMPP, VP_DISCRETE, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, VP_DISCRETE, DDPMPP)
