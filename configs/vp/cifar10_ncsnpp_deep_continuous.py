"""VP SDE with the deep NCSN++ on CIFAR-10."""

from configs.default_cifar10 import ConfigDict, get_default_config
from configs.methods import VP
from configs.networks import DEEP, NCSNPP


def get_config() -> ConfigDict:
    config = get_default_config(VP, NCSNPP, DEEP)
    config.model.embedding_type = "positional"
    return config
