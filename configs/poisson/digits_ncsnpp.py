"""PFGM with a small NCSN++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.default_digits import SMALL, ConfigDict, get_default_config
from configs.methods import POISSON
from configs.networks import NCSNPP


def get_config() -> ConfigDict:
    config = get_default_config(POISSON, NCSNPP, SMALL)
    config.training.small_batch_size = 96
    return config
