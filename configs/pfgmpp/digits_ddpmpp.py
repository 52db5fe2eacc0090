"""PFGM++ with a small DDPM++ on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.default_digits import SMALL, ConfigDict, get_default_config
from configs.methods import PFGMPP
from configs.networks import DDPMPP


def get_config() -> ConfigDict:
    config = get_default_config(PFGMPP, DDPMPP, SMALL)
    config.training.batch_size = 96
    return config
