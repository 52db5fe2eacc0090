"""PFGM++, D = 2048, with EDM's NCSN++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import EDM_TRAINING, PFGMPP
from configs.networks import EDM_NCSNPP


def get_config() -> ConfigDict:
    return get_default_config(PFGMPP, EDM_NCSNPP, EDM_TRAINING)
