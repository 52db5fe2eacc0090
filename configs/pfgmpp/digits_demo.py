"""PFGM++ with a thin DDPM++ on handwritten digits, 8 x 8: what `make demo` runs."""

from configs.parts import DDPMPP, PFGMPP, ConfigDict, demo, digits, experiment, quick


def get_config() -> ConfigDict:
    return experiment(PFGMPP, DDPMPP, digits, quick, demo)
