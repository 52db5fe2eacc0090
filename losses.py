"""Objectives by name: what a training step minimises. A further one is a line of `OBJECTIVES`."""

from configs.keys import named, of_part
from configs.schema import SHARE, Flag, Key, OneOf, whole
from methods.base import Method
from methods.field import poisson_field, posterior_mean
from objectives.base import Objective
from objectives.consistency import Consistency
from objectives.regression import Regression
from objectives.uncertainty import Uncertainty

__all__ = [
    "OBJECTIVES",
    "Consistency",
    "Objective",
    "Regression",
    "Uncertainty",
    "get_loss_fn",
    "poisson_field",
    "posterior_mean",
]

KEYS = {
    "training.objective": Key(
        "regression",
        OneOf(registry="losses.OBJECTIVES"),
        "training loss; 'uncertainty': regression with a learned variance of each noise level; "
        "'consistency': PFGM++, EDM and flows, for samples in one or a few evaluations, fine-tuned "
        "from a trained network (training.init_from)",
    ),
    "training.batch_size": Key(128, whole(1), "images of a step; they are the reference batch"),
    "training.small_batch_size": Key(
        0, whole(0), "examples of a step, out of the batch; 0: all of the batch"
    ),
    "training.reduce_mean": Key(
        False, Flag(), "mean over the entries of an image in the loss, not half the sum"
    ),
    "training.label_dropout": Key(
        0.1, SHARE, "share of the examples that lose their conditions, which guidance needs"
    ),
    "training.condition_dropout": Key(
        0.0,
        SHARE,
        "share of the examples whose condition of data.condition_path is replaced by 0, which "
        "guidance needs; examples that lose the kind of condition with the smaller share (of this "
        "and training.label_dropout) lose both",
    ),
}

# training.objective -> the class of the objective.
OBJECTIVES: dict[str, type[Objective]] = {
    "regression": Regression,
    "uncertainty": Uncertainty,
    "consistency": Consistency,
}


def own_keys(part: type[Objective]) -> list[str]:
    """The keys that an objective reads and plain regression does not."""
    keys = {*of_part(part, "keys"), *of_part(part, "options").values()}
    return sorted(keys - {*Regression.options.values()})


def objective_named(name: str) -> type[Objective]:
    """The class of the objective `name`; ValueError where there is none."""
    return named(OBJECTIVES, "training.objective", name)


def get_loss_fn(config, method: Method) -> Objective:
    """The objective of `config`: `loss_fn(net, batch, generator=None, step=0)`, a scalar.

    Raises:
        ValueError: `training.small_batch_size` is larger than the batch, or the objective is none
            of `method`.
    """
    return objective_named(config.training.objective).from_config(config, method)
