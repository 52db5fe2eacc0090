"""EDM, with EDM's DDPM++ on FFHQ at 64 x 64, a folder or zip at data.path."""

from configs.parts import EDM, EDM_DDPMPP, EDM_FFHQ, EDM_TRAINING, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(EDM, EDM_DDPMPP, EDM_TRAINING, EDM_FFHQ)
