"""VP SDE with the deep NCSN++ on CIFAR-10."""

import ml_collections

from configs.default_cifar10 import get_default_config
from configs.methods import VP
from configs.networks import NCSNPP


def get_config() -> ml_collections.ConfigDict:
    config = get_default_config()
    config.update(VP)
    config.update(NCSNPP)
    config.training.n_iters = 950001
    config.model.embedding_type = "positional"
    config.model.num_res_blocks = 8
    return config
