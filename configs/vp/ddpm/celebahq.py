"""DDPM on CelebA-HQ, 256 x 256."""

from configs.parts import DDPM_LARGE, LSUN, VP_DISCRETE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, VP_DISCRETE, DDPM_LARGE)
    config.data.dataset = "CelebAHQ"
    # Published so, though these images are 1024 pixels wide.
    config.data.tfrecords_path = "/atlas/u/yangsong/celeba_hq/-r10.tfrecords"
    return config
