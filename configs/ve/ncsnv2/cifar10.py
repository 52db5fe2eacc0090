"""NCSNv2 on CIFAR-10."""

from configs.parts import CIFAR10, NCSNV2_64, SMLD, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, SMLD, NCSNV2_64)
    config.optim.lr = 1e-4
    config.model.num_scales = 232
    config.sampling.snr = 0.176
    return config
