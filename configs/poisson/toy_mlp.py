"""PFGM with a small MLP on points of the plane: seconds on a CPU."""

from configs.parts import MLP, POISSON, ConfigDict, experiment, toy


def get_config() -> ConfigDict:
    config = experiment(POISSON, MLP, toy)
    config.training.small_batch_size = 256
    return config
