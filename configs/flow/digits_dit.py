"""Rectified flow with a small DiT on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import DIT, FLOW, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(FLOW, digits, DIT)
    config.training.batch_size = 96
    config.model.update(nf=64, depth=4, heads=4)
    return config
