"""PFGM++ with a small DDPM++ on your own images, 32 x 32: --config.data.path=photos/."""

from configs.parts import DDPMPP, PFGMPP, ConfigDict, experiment, images


def get_config() -> ConfigDict:
    return experiment(DDPMPP, images, PFGMPP)
