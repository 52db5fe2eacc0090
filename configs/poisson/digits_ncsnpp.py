"""PFGM with a small NCSN++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import NCSNPP, POISSON, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(POISSON, NCSNPP, digits)
    config.training.small_batch_size = 96
    return config
