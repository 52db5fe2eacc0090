"""EDM, with EDM's DDPM++ on CIFAR-10."""

from configs.parts import CIFAR10, EDM, EDM_DDPMPP, EDM_TRAINING, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, EDM, EDM_DDPMPP, EDM_TRAINING)
