"""The parts of an experiment, as modules below `experiment`, which builds them, see them."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from datasets import Data, DataSet
from likelihood import Likelihood
from losses import Objective
from methods.base import Method
from samplers.base import Sampler
from sources.batch import Conditions
from sources.codec import Codec
from sources.preparation import Preparation


class Parts(Protocol):
    """Attributes of an `experiment.Experiment` that these modules use."""

    device: torch.device
    method: Method
    codec: Codec
    network: nn.Module
    objective: Objective
    sampler: Sampler
    likelihood: Likelihood
    draw_conditions: Callable[..., Conditions]
    check_ode: Callable[[str], None]
    data: Data
    condition_codec: Codec | None
    classes: int
    limits: dict[str, float]
    parts: dict[str, Any]
    objective_settings: dict[str, Any]
    preparation: Preparation
    training_set: Callable[[DataSet], tuple[DataSet, Preparation]]
