"""sub-VP SDE with the network of DDPM on CIFAR-10."""

from configs.parts import CIFAR10, DDPM, SUBVP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, SUBVP, DDPM)
