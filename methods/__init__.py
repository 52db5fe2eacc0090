"""The generative methods, by name. A further one is a file and a line of `METHODS`."""

from configs.keys import named
from configs.schema import Key, OneOf
from methods.base import Method
from methods.edm_table import EDMVE, EDMVP, IDDPM
from methods.field_matching import FieldMatching
from methods.flow import RectifiedFlow, TrigFlow
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
    "flow": RectifiedFlow,
    "trigflow": TrigFlow,
    "edm_vp": EDMVP,
    "edm_ve": EDMVE,
    "iddpm": IDDPM,
    "efm": FieldMatching,
}

KEYS = {"training.sde": Key("", OneOf(registry="methods.METHODS"), "the method")}


def method_class(name: str) -> type[Method]:
    """The class of the method `name`, a value of `training.sde`; ValueError if it is unknown."""
    return named(METHODS, "training.sde", name)


def get_method(config) -> Method:
    """The method that `config.training.sde` names, its numbers read from the config once.

    Raises:
        ValueError: the method is unknown, or its numbers contradict each other.
    """
    return method_class(config.training.sde).from_config(config)
