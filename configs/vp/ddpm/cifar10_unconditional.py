"""DDPM on CIFAR-10 with a network that does not see the time."""

from configs.parts import CIFAR10, DDPM, VP_DISCRETE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, VP_DISCRETE, DDPM)
    config.model.conditional = False
    return config
