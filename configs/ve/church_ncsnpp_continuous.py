"""VE SDE with NCSN++ on LSUN churches, 256 x 256."""

from configs.parts import LSUN, NCSNPP_LARGE, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, VE, NCSNPP_LARGE)
    config.data.category = "church_outdoor"
    config.model.sigma_max = 380.0
    return config
