"""The generative methods, by name. A further one is a file and a line of `METHODS`."""

from configs.keys import named
from methods.base import Method
from methods.pfgmpp import EDM, PFGMPP
from methods.poisson import Poisson
from methods.sde import VESDE, VPSDE, SubVPSDE

# training.sde -> the method.
METHODS: dict[str, type[Method]] = {
    "poisson": Poisson,
    "pfgmpp": PFGMPP,
    "edm": EDM,
    "vesde": VESDE,
    "vpsde": VPSDE,
    "subvpsde": SubVPSDE,
}


def method_class(config) -> type[Method]:
    """The class of the method that `config.training.sde` names; ValueError where it is unknown."""
    return named(METHODS, "training.sde", config.training.sde)


def get_method(config) -> Method:
    """The method that `config.training.sde` names, its numbers read from the config once.

    Raises:
        ValueError: the method is unknown, or its numbers contradict each other.
    """
    method, model = method_class(config), config.model
    if model.scale_by_sigma and not method.gives_score:
        raise ValueError(
            "model.scale_by_sigma makes the network's output a score, which "
            f"training.sde={config.training.sde!r} does not take: set model.scale_by_sigma=False"
        )
    embedding = model.embedding_type.lower()
    if model.name.lower() == "ncsnpp" and embedding == "fourier" and not method.positive_labels:
        raise ValueError(
            "model.embedding_type='fourier' takes the log of noise labels, which are negative too "
            f"with training.sde={config.training.sde!r}: set model.embedding_type='positional'"
        )
    return method.from_config(config)
