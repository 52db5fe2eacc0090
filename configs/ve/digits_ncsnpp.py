"""VE SDE with a small NCSN++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.default_digits import SMALL, ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import NCSNPP


def get_config() -> ConfigDict:
    config = get_default_config(VE, NCSNPP, SMALL)
    config.training.batch_size = 96
    config.model.fourier_scale = 1.0  # smooth in the noise level: few steps have to learn it
    config.sampling.method = "ode"
    return config
