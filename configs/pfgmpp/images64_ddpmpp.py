"""PFGM++ with a small DDPM++ on your own images, 64 x 64: --config.data.path=photos/."""

from configs.parts import DDPMPP, PFGMPP, ConfigDict, experiment, images


def get_config() -> ConfigDict:
    config = experiment(DDPMPP, images, PFGMPP)
    config.data.image_size = 64
    return config
