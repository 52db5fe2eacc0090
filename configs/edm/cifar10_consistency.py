"""EDM in one or two evaluations on CIFAR-10, from a network of cifar10_ddpmpp.py.

--config.training.init_from=FILE
"""

from configs.parts import CIFAR10, ECT, EDM, EDM_DDPMPP, EDM_TRAINING, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, EDM, EDM_DDPMPP, EDM_TRAINING, ECT)
