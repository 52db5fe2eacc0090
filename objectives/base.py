"""Base of the objectives: which examples a step takes of a batch, and which lose their conditions.

An objective draws examples from a batch (`draw`), and gives their loss (`loss`). It may own
parameters, which are optimised and saved with the network's, and follow a schedule over the steps.
"""

import abc
import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from configs.keys import arguments
from configs.schema import Key
from methods.base import Method, Network
from sources.batch import Batch


class Objective(nn.Module, abc.ABC):
    """Loss of a network on examples that it draws from a batch.

    Attributes:
        keys: the keys that the objective declares, for `configs.default`.
        options: {argument of the constructor: the key that it is read from}.
        predicts_mean: true where the network learns E[image | x], from which the method's ODE is
            computed (`check_ode`).
        method: makes the examples and the predictions.
        batch_size: number of images that a training step takes from the data: those that are
            perturbed or, where the targets depend on a reference batch, all images of that batch.
        examples: number of these images that are perturbed; the others are only in the reference
            batch.
        label_dropout, condition_dropout: shares of the examples that lose conditions of these kinds
            (`sources.batch.KINDS`); the examples of the smaller share are among those of the
            larger.
    """

    keys: ClassVar[Mapping[str, Key]] = {}
    options: ClassVar[Mapping[str, str]] = {
        "batch_size": "training.batch_size",
        "examples": "training.small_batch_size",
        "label_dropout": "training.label_dropout",
        "condition_dropout": "training.condition_dropout",
    }
    predicts_mean: ClassVar[bool] = True

    def __init__(
        self,
        method: Method,
        batch_size: int,
        examples: int,
        label_dropout: float = 0.0,
        condition_dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= examples <= batch_size:
            raise ValueError(
                f"training.small_batch_size must be between 0 and training.batch_size "
                f"({batch_size}), not {examples}"
            )
        self.method, self.examples = method, examples or batch_size
        self.batch_size = batch_size if method.uses_reference_batch else self.examples
        self.label_dropout, self.condition_dropout = label_dropout, condition_dropout

    @classmethod
    def from_config(cls, config, method: Method) -> Self:
        """The objective of `config`; ValueError where its numbers contradict each other."""
        return cls(method, **arguments(cls, config))

    @classmethod
    def check_ode(cls, feature: str) -> None:
        """Raise ValueError unless the network gives the method's ODE, which `feature` follows."""
        if not cls.predicts_mean:
            raise ValueError(
                f"{feature} follows the method's ODE, which needs a network that predicts "
                f"E[image | x]: that of training.objective={cls.__name__.lower()!r} does not"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings, by name, that change the loss, other than the objective's own keys."""
        return {}

    def phase(self, step: int) -> str:
        """Name of the part of the schedule that training step number `step` is in; "" for none."""
        return ""

    def forward(
        self,
        net: Network,
        batch: Batch | Tensor,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Tensor:
        """The loss, a scalar, of scaled images (B, C, H, W) or a batch of them."""
        batch = batch if isinstance(batch, Batch) else Batch(batch)
        batch = self.reference(batch, generator)
        return self.loss(net, self.draw(batch, step, generator), batch)

    def reference(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """The reference batch of a training step on `batch`, from which the examples are drawn."""
        return self.method.reference(batch, generator)

    @torch.no_grad()
    def draw(self, batch: Batch, step: int = 0, generator: torch.Generator | None = None) -> Batch:
        """The perturbed examples of training step number `step` on `batch`."""
        batch = batch[: self.examples]
        examples = self.perturb(batch, step, generator)
        shares = {"label": self.label_dropout, "condition": self.condition_dropout}
        shares = {k: p for k, p in shares.items() if p and examples.conditions.droppable(k)}
        if shares:
            # drawn last, so that the method's draws do not change, and once for all kinds, since
            # guidance drops all conditions at once
            draw = torch.rand(len(examples), generator=generator, device=examples.images.device)
            for kind, share in shares.items():
                conditions = examples.conditions.drop(draw < share, kind)
                examples = replace(examples, conditions=conditions)
        return examples

    def perturb(self, batch: Batch, step: int, generator: torch.Generator | None = None) -> Batch:
        """An example of each image of `batch`; here `Method.draw`."""
        return self.method.draw(batch, generator)

    def whole(self) -> Self:
        """A view, of the same parameters, whose `draw` takes every image and drops no condition.

        It is for the loss over a data set, whose draws are those of the objective all the same.
        """
        view = copy.copy(self)
        view.examples, view.label_dropout, view.condition_dropout = sys.maxsize, 0.0, 0.0
        return view

    @abc.abstractmethod
    def loss(self, net: Network, examples: Batch, reference: Batch) -> Tensor:
        """The loss, a scalar, of `examples`, with the targets that `reference` makes."""
