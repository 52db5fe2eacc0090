"""VE SDE with NCSN++ on LSUN bedrooms, 256 x 256."""

import ml_collections

from configs.default_lsun import get_default_config
from configs.methods import VE
from configs.networks import NCSNPP_LARGE


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VE)
    config.update(NCSNPP_LARGE)
    config.data.category = "bedroom"
    return config
