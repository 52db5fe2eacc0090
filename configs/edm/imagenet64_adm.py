"""EDM with ADM on ImageNet at 64 x 64 with class labels, a folder or zip at data.path."""

from ml_collections import ConfigDict

from configs import default
from configs.methods import EDM, EDM_IMAGENET, EDM_TRAINING
from configs.networks import ADM


def get_config() -> ConfigDict:
    parts = (EDM, ADM, EDM_TRAINING, EDM_IMAGENET)
    config = default.updated(default.get_default_config(), parts)
    config.data.dataset = "folder"
    config.data.image_size = 64
    config.data.num_classes = 1000
    config.data.random_flip = False
    return config
