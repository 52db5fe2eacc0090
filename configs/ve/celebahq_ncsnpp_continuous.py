"""VE SDE with NCSN++ on CelebA-HQ, 1024 x 1024."""

from configs.parts import FACES_1024, LSUN, NCSNPP_LARGE, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, VE, NCSNPP_LARGE, FACES_1024)
    config.data.dataset = "CelebAHQ"
    config.data.tfrecords_path = "/atlas/u/yangsong/celeba_hq/-r10.tfrecords"
    return config
