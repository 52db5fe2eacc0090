"""sub-VP SDE with the deep NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, DEEP, NCSNPP_POSITIONAL, SUBVP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, SUBVP, NCSNPP_POSITIONAL, DEEP)
