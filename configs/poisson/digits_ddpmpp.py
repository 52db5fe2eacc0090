"""PFGM with a small DDPM++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import DDPMPP, POISSON, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(POISSON, DDPMPP, digits)
    config.training.small_batch_size = 96
    return config
