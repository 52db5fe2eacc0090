"""PFGM with the deep DDPM++ on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import POISSON
from configs.networks import DDPMPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(POISSON)
    config.update(DDPMPP)
    config.model.num_res_blocks = 8
    config.eval.begin_ckpt = 8
    return config
