"""The generative methods, by name. A further one is a file and a line of `METHODS`."""

from methods.base import Method
from methods.poisson import Poisson
from methods.sde import VESDE, VPSDE, SubVPSDE

# training.sde -> the method.
METHODS: dict[str, type[Method]] = {
    "poisson": Poisson,
    "vesde": VESDE,
    "vpsde": VPSDE,
    "subvpsde": SubVPSDE,
}


def method_class(config) -> type[Method]:
    """The class of the method that `config.training.sde` names; ValueError where it is unknown."""
    name = config.training.sde.lower()
    if name not in METHODS:
        raise ValueError(f"unknown method training.sde={name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def get_method(config) -> Method:
    """The method that `config.training.sde` names, its numbers read from the config once.

    Raises:
        ValueError: the method is unknown, or its numbers contradict each other.
    """
    method = method_class(config)
    if config.model.scale_by_sigma and not method.gives_score:
        raise ValueError(
            "model.scale_by_sigma makes the network's output a score, which "
            f"training.sde={config.training.sde!r} does not take: set model.scale_by_sigma=False"
        )
    return method.from_config(config)
