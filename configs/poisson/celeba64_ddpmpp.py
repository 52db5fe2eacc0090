"""PFGM with DDPM++ on CelebA, 64 x 64."""

from configs.parts import CELEBA, DDPMPP, POISSON, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CELEBA, POISSON, DDPMPP)
    config.seed = 42
    config.training.batch_size = 512
    config.training.eval_freq = 5000
    config.eval.begin_ckpt = 5
    return config
