"""Rectified flow with a small DiT on handwritten digits, 8 x 8: minutes on two CPU cores."""

from configs.parts import DIT, FLOW, ConfigDict, digits, experiment, quick


def get_config() -> ConfigDict:
    config = experiment(FLOW, digits, quick, DIT)
    config.training.small_batch_size = 96
    config.optim.optimizer = "Muon"
    config.model.update(nf=64, depth=4, heads=4)
    return config
