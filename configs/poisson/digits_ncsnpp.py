"""PFGM with a small NCSN++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

import ml_collections

from configs.default_digits import SMALL, get_default_config
from configs.methods import POISSON
from configs.networks import NCSNPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(POISSON)
    config.update(NCSNPP)
    config.update(SMALL)
    config.training.small_batch_size = 96
    return config
