"""VE with EDM's preconditioning and training, NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, EDM_NCSNPP, EDM_TRAINING, EDM_VE, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, EDM_VE, EDM_NCSNPP, EDM_TRAINING)
