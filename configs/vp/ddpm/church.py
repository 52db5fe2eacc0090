"""DDPM on LSUN churches, 256 x 256."""

from configs.parts import DDPM_LARGE, LSUN, VP_DISCRETE, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, VP_DISCRETE, DDPM_LARGE)
    config.data.category = "church_outdoor"
    return config
