"""PFGM++ with a small DiT on handwritten digits, 8 x 8: 16 patches; minutes on two CPU cores."""

from configs.parts import DIT, PFGMPP, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(PFGMPP, digits, DIT)
    config.training.batch_size = 96
    config.model.update(nf=64, depth=4, heads=4)
    return config
