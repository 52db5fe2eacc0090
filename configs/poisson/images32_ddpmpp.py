"""PFGM with a small DDPM++ on your own images, 32 x 32: --config.data.path=photos/."""

import ml_collections

from configs.default_images import get_default_config, make_small
from configs.methods import POISSON
from configs.networks import DDPMPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config(image_size=32)
    config.update(POISSON)
    config.update(DDPMPP)
    make_small(config)
    return config
