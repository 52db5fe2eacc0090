"""VP SDE with a small DDPM++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import DDPMPP, VP, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(VP, DDPMPP, digits)
    config.training.batch_size = 96
    return config
