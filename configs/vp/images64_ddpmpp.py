"""VP SDE with a small DDPM++ on your own images, 64 x 64: --config.data.path=photos/."""

import ml_collections

from configs.default_images import get_default_config, make_small
from configs.methods import VP
from configs.networks import DDPMPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config(image_size=64)
    config.update(VP)
    config.update(DDPMPP)
    make_small(config)
    return config
