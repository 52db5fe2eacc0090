"""NCSN with techniques 1, 2, 4 and 5 of NCSNv2 on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import SMLD
from configs.networks import NCSN


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(SMLD)
    config.update(NCSN)
    config.model.num_scales = 232
    config.sampling.snr = 0.176
    return config
