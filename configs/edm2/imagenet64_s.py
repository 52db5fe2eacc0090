"""EDM2-S on ImageNet at 64 x 64 with class labels, a folder or zip at data.path."""

from configs.parts import EDM, EDM2, EDM2_TRAINING, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(EDM, EDM2, EDM2_TRAINING)
    config.model.nf, config.optim.lr = 192, 0.01
    return config
