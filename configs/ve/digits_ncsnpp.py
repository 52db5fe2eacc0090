"""VE SDE with a small NCSN++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

import ml_collections

from configs.default_digits import SMALL, get_default_config
from configs.methods import VE
from configs.networks import NCSNPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VE)
    config.update(NCSNPP)
    config.update(SMALL)
    config.training.batch_size = 96
    config.model.fourier_scale = 1.0  # smooth in the noise level: few steps have to learn it
    config.sampling.method = "ode"
    return config
