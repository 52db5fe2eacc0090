"""NCSNv2 on CelebA, 64 x 64."""

from configs.parts import CELEBA, NCSNV2_64, SMLD, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CELEBA, SMLD, NCSNV2_64)
    config.optim.lr = 1e-4
    config.model.num_scales = 500
    config.sampling.snr = 0.128
    return config
