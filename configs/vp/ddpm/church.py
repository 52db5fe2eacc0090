"""DDPM on LSUN churches, 256 x 256."""

from configs.default_lsun import ConfigDict, get_default_config
from configs.methods import VP_DISCRETE
from configs.networks import DDPM_LARGE


def get_config() -> ConfigDict:
    config = get_default_config(VP_DISCRETE, DDPM_LARGE)
    config.data.category = "church_outdoor"
    config.optim.lr = 2e-5
    config.model.num_scales = 1000
    return config
