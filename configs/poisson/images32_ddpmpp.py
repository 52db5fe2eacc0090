"""PFGM with a small DDPM++ on your own images, 32 x 32: --config.data.path=photos/."""

from configs.default_images import ConfigDict, get_default_config
from configs.methods import POISSON
from configs.networks import DDPMPP


def get_config() -> ConfigDict:
    return get_default_config(32, POISSON, DDPMPP)
