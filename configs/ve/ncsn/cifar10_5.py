"""NCSN with technique 5 of NCSNv2 on CIFAR-10."""

from configs.parts import CIFAR10, NCSN, SMLD, SMLD_2019, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, SMLD, NCSN, SMLD_2019)
