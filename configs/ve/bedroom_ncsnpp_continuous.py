"""VE SDE with NCSN++ on LSUN bedrooms, 256 x 256."""

from configs.default_lsun import ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import NCSNPP_LARGE


def get_config() -> ConfigDict:
    config = get_default_config(VE, NCSNPP_LARGE)
    config.data.category = "bedroom"
    return config
