"""EDM, with EDM's NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, EDM, EDM_NCSNPP, EDM_TRAINING, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, EDM, EDM_NCSNPP, EDM_TRAINING)
