"""VP SDE with NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, NCSNPP_POSITIONAL, VP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, VP, NCSNPP_POSITIONAL)
