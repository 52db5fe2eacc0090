"""EDM, with EDM's DDPM++ on FFHQ at 64 x 64, a folder or zip at data.path."""

from ml_collections import ConfigDict

from configs import default
from configs.methods import EDM, EDM_FFHQ, EDM_TRAINING
from configs.networks import EDM_DDPMPP


def get_config() -> ConfigDict:
    parts = (EDM, EDM_DDPMPP, EDM_TRAINING, EDM_FFHQ)
    config = default.updated(default.get_default_config(), parts)
    config.data.dataset = "folder"
    config.data.image_size = 64
    return config
