"""PFGM with the deep DDPM++ on CIFAR-10."""

from configs.parts import CIFAR10, DDPMPP, POISSON, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, POISSON, DDPMPP)
    config.model.num_res_blocks = 8
    config.eval.begin_ckpt = 8
    return config
