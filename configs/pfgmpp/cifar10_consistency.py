"""PFGM++, D = 2048, in one or two evaluations on CIFAR-10, from a network of cifar10_ddpmpp.py.

--config.training.init_from=FILE
"""

from configs.parts import CIFAR10, ECT, EDM_DDPMPP, EDM_TRAINING, PFGMPP, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CIFAR10, PFGMPP, EDM_DDPMPP, EDM_TRAINING, ECT)
