"""EDM with ADM on ImageNet at 64 x 64 with class labels, a folder or zip at data.path."""

from configs.parts import ADM, EDM, EDM_IMAGENET, EDM_TRAINING, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(EDM, ADM, EDM_TRAINING, EDM_IMAGENET)
