"""VE SDE with NCSN++ on FFHQ, 256 x 256."""

from configs.parts import LSUN, NCSNPP_LARGE, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, VE, NCSNPP_LARGE)
    config.data.dataset = "FFHQ"
    config.data.tfrecords_path = "/home/yangsong/ncsc/ffhq/ffhq-r08.tfrecords"
    config.model.sigma_max = 348.0
    return config
