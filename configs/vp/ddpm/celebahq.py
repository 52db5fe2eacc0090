"""DDPM on CelebA-HQ, 256 x 256."""

from configs.default_lsun import ConfigDict, get_default_config
from configs.methods import VP_DISCRETE
from configs.networks import DDPM_LARGE


def get_config() -> ConfigDict:
    config = get_default_config(VP_DISCRETE, DDPM_LARGE)
    config.data.dataset = "CelebAHQ"
    # Published so, though these images are 1024 pixels wide.
    config.data.tfrecords_path = "/atlas/u/yangsong/celeba_hq/-r10.tfrecords"
    config.optim.lr = 2e-5
    config.model.num_scales = 1000
    return config
