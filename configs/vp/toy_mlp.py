"""VP SDE with a small MLP on points of the plane: seconds on a CPU."""

from configs.parts import MLP, VP, ConfigDict, experiment, toy


def get_config() -> ConfigDict:
    config = experiment(VP, MLP, toy)
    config.sampling.method = "ode"
    return config
