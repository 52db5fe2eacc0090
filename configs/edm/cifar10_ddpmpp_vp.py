"""VP with EDM's preconditioning and training, DDPM++ on CIFAR-10."""

from configs.parts import CIFAR10, EDM_DDPMPP, EDM_TRAINING, EDM_VP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, EDM_VP, EDM_DDPMPP, EDM_TRAINING)
