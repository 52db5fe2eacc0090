"""PFGM++ (D = 16) with a small MLP on points of the plane: seconds on a CPU."""

from configs.parts import MLP, PFGMPP, ConfigDict, experiment, toy


def get_config() -> ConfigDict:
    config = experiment(PFGMPP, MLP, toy)
    config.model.D = 16.0
    return config
