"""PFGM with a thin DDPM++ on handwritten digits, 8 x 8: the recipe of `make demo`."""

from configs.parts import DDPMPP, POISSON, ConfigDict, demo, digits, experiment, quick


def get_config() -> ConfigDict:
    return experiment(POISSON, DDPMPP, digits, quick, demo)
