"""NCSNv2 on CelebA, 64 x 64."""

from configs.default_celeba import ConfigDict, get_default_config
from configs.methods import SMLD
from configs.networks import NCSNV2_64


def get_config() -> ConfigDict:
    config = get_default_config(SMLD, NCSNV2_64)
    config.optim.lr = 1e-4
    config.model.num_scales = 500
    config.sampling.snr = 0.128
    return config
