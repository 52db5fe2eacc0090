"""TrigFlow with a small DDPM++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import DDPMPP, TRIGFLOW, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(TRIGFLOW, DDPMPP, digits)
    config.training.batch_size = 96
    return config
