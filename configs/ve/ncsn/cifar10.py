"""NCSN on CIFAR-10."""

from configs.parts import CIFAR10, NCSN, SMLD, SMLD_2019, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, SMLD, NCSN, SMLD_2019)
    config.model.ema_rate = 0.0
    return config
