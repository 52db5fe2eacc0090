"""PFGM with NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, NCSNPP, POISSON, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, POISSON, NCSNPP)
    config.model.ema_rate = 0.999
    config.eval.begin_ckpt = 8
    return config
