"""VE SDE with a small NCSN++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import NCSNPP, VE, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(VE, NCSNPP, digits)
    config.training.batch_size = 96
    config.model.fourier_scale = 1.0  # smooth in the noise level: few steps have to learn it
    return config
