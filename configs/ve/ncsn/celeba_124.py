"""NCSN with techniques 1, 2 and 4 of NCSNv2 on CelebA, 64 x 64."""

from configs.parts import CELEBA, NCSN, SMLD, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CELEBA, SMLD, NCSN)
    config.model.ema_rate = 0.0
    config.model.num_scales = 500
    config.sampling.snr = 0.128
    return config
