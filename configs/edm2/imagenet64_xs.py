"""EDM2-XS on ImageNet at 64 x 64 with class labels, a folder or zip at data.path."""

from configs.parts import EDM, EDM2, EDM2_TRAINING, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(EDM, EDM2, EDM2_TRAINING)
