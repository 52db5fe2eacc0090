"""NCSN with technique 5 of NCSNv2 on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import SMLD
from configs.networks import NCSN


def get_config() -> ConfigDict:
    config = get_default_config(SMLD, NCSN)
    config.model.num_scales = 10
    config.model.sigma_max = 1.0
    config.sampling.n_steps_each = 100
    config.sampling.snr = 0.316
    return config
