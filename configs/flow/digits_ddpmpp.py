"""Rectified flow with a small DDPM++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import DDPMPP, FLOW, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(FLOW, DDPMPP, digits)
    config.training.batch_size = 96
    return config
