"""DDPM (discrete VP) with NCSN++ on CIFAR-10."""

from configs.parts import CIFAR10, NCSNPP_POSITIONAL, VP, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(CIFAR10, VP, NCSNPP_POSITIONAL)
    config.training.continuous = False
    config.sampling.predictor = "reverse_diffusion"
    return config
