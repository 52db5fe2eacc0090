"""VP SDE with a small DDPM++ on your own images, 64 x 64: --config.data.path=photos/."""

from configs.parts import DDPMPP, VP, ConfigDict, experiment, images


def get_config() -> ConfigDict:
    config = experiment(VP, DDPMPP, images)
    config.data.image_size = 64
    return config
