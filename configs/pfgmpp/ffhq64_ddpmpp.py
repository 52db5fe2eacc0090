"""PFGM++, D = 128, with EDM's DDPM++ on FFHQ at 64 x 64, a folder or zip at data.path."""

from configs.parts import EDM_DDPMPP, EDM_FFHQ, EDM_TRAINING, PFGMPP, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(PFGMPP, EDM_DDPMPP, EDM_TRAINING, EDM_FFHQ)
    config.model.D = 128.0
    return config
