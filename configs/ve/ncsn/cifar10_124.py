"""NCSN with techniques 1, 2 and 4 of NCSNv2 on CIFAR-10."""

from configs.parts import CIFAR10, NCSN, SMLD, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, SMLD, NCSN)
    config.model.ema_rate = 0.0
    config.model.num_scales = 232
    config.sampling.snr = 0.176
    return config
