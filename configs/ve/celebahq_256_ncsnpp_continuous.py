"""VE SDE with NCSN++ on CelebA-HQ, 256 x 256."""

from configs.default_lsun import ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import NCSNPP_LARGE


def get_config() -> ConfigDict:
    config = get_default_config(VE, NCSNPP_LARGE)
    config.data.dataset = "CelebAHQ"
    config.data.tfrecords_path = "/home/yangsong/ncsc/celebahq/r08.tfrecords"
    config.model.sigma_max = 348.0
    return config
