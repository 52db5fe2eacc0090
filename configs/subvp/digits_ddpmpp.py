"""sub-VP SDE with a small DDPM++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import DDPMPP, SUBVP, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(SUBVP, DDPMPP, digits)
    config.training.batch_size = 96
    return config
