"""sub-VP SDE with NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, NCSNPP_POSITIONAL, SUBVP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, SUBVP, NCSNPP_POSITIONAL)
