"""VE SDE with NCSN++ on FFHQ, 1024 x 1024."""

from configs.default_faces1024 import ConfigDict, get_default_config
from configs.methods import VE
from configs.networks import NCSNPP_LARGE


def get_config() -> ConfigDict:
    config = get_default_config(VE, NCSNPP_LARGE)
    config.data.dataset = "FFHQ"
    config.data.tfrecords_path = "/raid/song/ffhq-dataset/ffhq/ffhq-r10.tfrecords"
    config.training.reduce_mean = True
    config.model.ema_rate = 0.9999
    config.model.nf = 16
    config.model.ch_mult = (1, 2, 4, 8, 16, 32, 32, 32)
    config.model.num_res_blocks = 1
    return config
