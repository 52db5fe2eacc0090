"""Rectified flow with a small MLP on points of the plane: seconds on a CPU."""

from configs.parts import FLOW, MLP, ConfigDict, experiment, toy


def get_config() -> ConfigDict:
    return experiment(FLOW, MLP, toy)
