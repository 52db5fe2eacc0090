"""VE SDE with NCSN++ on CelebA-HQ, 256 x 256."""

from configs.parts import LSUN, NCSNPP_LARGE, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, VE, NCSNPP_LARGE)
    config.data.dataset = "CelebAHQ"
    config.data.tfrecords_path = "/home/yangsong/ncsc/celebahq/r08.tfrecords"
    config.model.sigma_max = 348.0
    return config
