"""PFGM with DDPM++ on CelebA, 64 x 64."""

from configs.default_celeba import ConfigDict, get_default_config
from configs.methods import POISSON
from configs.networks import DDPMPP


def get_config() -> ConfigDict:
    config = get_default_config(POISSON, DDPMPP)
    config.seed = 42
    config.training.batch_size = 512
    config.training.eval_freq = 5000
    config.eval.begin_ckpt = 5
    return config
