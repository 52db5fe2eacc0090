"""PFGM++, D = 2048, with EDM's NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, EDM_NCSNPP, EDM_TRAINING, PFGMPP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, PFGMPP, EDM_NCSNPP, EDM_TRAINING)
