"""VE SDE with NCSN++ on FFHQ, 1024 x 1024."""

from configs.parts import FACES_1024, LSUN, NCSNPP_LARGE, VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, VE, NCSNPP_LARGE, FACES_1024)
    config.data.dataset = "FFHQ"
    config.data.tfrecords_path = "/raid/song/ffhq-dataset/ffhq/ffhq-r10.tfrecords"
    config.training.reduce_mean = True
    return config
