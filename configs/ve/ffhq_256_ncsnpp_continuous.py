"""VE SDE with NCSN++ on FFHQ, 256 x 256."""

from configs.default_lsun import ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import NCSNPP_LARGE


def get_config() -> ConfigDict:
    config = get_default_config(VE, NCSNPP_LARGE)
    config.data.dataset = "FFHQ"
    config.data.tfrecords_path = "/home/yangsong/ncsc/ffhq/ffhq-r08.tfrecords"
    config.model.sigma_max = 348.0
    return config
