"""SMLD (discrete VE) with the network of DDPM on CIFAR-10."""

from configs.parts import CIFAR10, DDPM, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, VE, DDPM)
    config.training.continuous = False
    return config
