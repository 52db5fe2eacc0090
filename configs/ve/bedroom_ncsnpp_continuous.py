"""VE SDE with NCSN++ on LSUN bedrooms, 256 x 256."""

from configs.parts import LSUN, NCSNPP_LARGE, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, VE, NCSNPP_LARGE)
    config.data.category = "bedroom"
    return config
