"""VP SDE with a thin DDPM++ on handwritten digits, 8 x 8: the recipe of `make demo`."""

from configs.parts import DDPMPP, VP, ConfigDict, demo, digits, experiment, quick


def get_config() -> ConfigDict:
    return experiment(VP, DDPMPP, digits, quick, demo)
