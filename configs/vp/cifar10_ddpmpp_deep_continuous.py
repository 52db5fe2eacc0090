"""VP SDE with the deep DDPM++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VP
from configs.networks import DDPMPP


def get_config() -> ConfigDict:
    config = get_default_config(VP, DDPMPP)
    config.training.n_iters = 950001
    config.model.num_res_blocks = 8
    return config
