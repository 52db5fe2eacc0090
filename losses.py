"""Objectives: what a training step minimises. A further one is a class and a line of `OBJECTIVES`.

An objective draws examples from a batch (`draw`), and gives their loss (`loss`). It may own
parameters, which are optimised and saved with the network's, and follow a schedule over the steps.
"""

import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from configs.keys import arguments, named, of_part
from configs.schema import SHARE, Flag, Key, OneOf, whole
from methods.base import Method, Network, conditioned
from methods.field import poisson_field, posterior_mean
from sources.batch import Batch

__all__ = ["OBJECTIVES", "Regression", "get_loss_fn", "poisson_field", "posterior_mean"]

KEYS = {
    "training.objective": Key("regression", OneOf(registry="losses.OBJECTIVES"), "training loss"),
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
}


class Regression(nn.Module):
    """The squared error between a method's prediction and its target.

    Half the sum over the entries of an example, or with `reduce_mean` their mean, weighted by the
    method, averaged over the examples.

    Attributes:
        keys: the keys that the objective declares, for `configs.default`.
        options: {argument of the constructor: the key that it is read from}.
        method: whose prediction.
        reduce_mean: see above.
        batch_size: images that a training step takes from the data.
        examples: number of these that are perturbed; the whole batch is the reference batch.
        label_dropout: share of the examples that lose their conditions; see `Conditions.drop`.
    """

    keys: ClassVar[Mapping[str, Key]] = {}
    options: ClassVar[Mapping[str, str]] = {
        "reduce_mean": "training.reduce_mean",
        "batch_size": "training.batch_size",
        "examples": "training.small_batch_size",
        "label_dropout": "training.label_dropout",
    }

    def __init__(
        self,
        method: Method,
        reduce_mean: bool,
        batch_size: int,
        examples: int,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= examples <= batch_size:
            raise ValueError(
                f"training.small_batch_size must be between 0 and training.batch_size "
                f"({batch_size}), not {examples}"
            )
        self.method, self.reduce_mean, self.examples = method, reduce_mean, examples or batch_size
        self.label_dropout = label_dropout
        self.batch_size = batch_size if method.uses_reference_batch else self.examples

    @classmethod
    def from_config(cls, config, method: Method) -> Self:
        """The objective of `config`; ValueError where its numbers contradict each other."""
        return cls(method, **arguments(cls, config))

    def forward(
        self,
        net: Network,
        batch: Batch | Tensor,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Tensor:
        """The loss, a scalar, of scaled images (B, C, H, W) or a batch of them."""
        batch = batch if isinstance(batch, Batch) else Batch(batch)
        return self.loss(net, self.draw(batch, step, generator), batch)

    @torch.no_grad()
    def draw(self, batch: Batch, step: int = 0, generator: torch.Generator | None = None) -> Batch:
        """The perturbed examples of training step number `step` on `batch`; see `Method.draw`."""
        batch = batch[: self.examples]
        examples = self.method.draw(batch, generator)
        if not (self.label_dropout and examples.conditions.droppable):
            return examples
        # the last draw, so that it changes none of the method's
        uniform = torch.rand(len(examples), generator=generator, device=examples.images.device)
        mask = uniform < self.label_dropout
        return replace(examples, conditions=examples.conditions.drop(mask))

    def whole(self) -> Self:
        """A view, of the same parameters, whose `draw` takes every image and drops no condition.

        It is for the loss over a data set, whose draws are those of the objective all the same.
        """
        view = copy.copy(self)
        view.examples, view.label_dropout = sys.maxsize, 0.0
        return view

    def loss(self, net: Network, examples: Batch, reference: Batch) -> Tensor:
        """The loss, a scalar, of `examples`, with the targets that `reference` makes."""
        squared = self.squared_errors(net, examples, reference)
        return squared.mean() if self.reduce_mean else 0.5 * squared.sum(1).mean()

    def squared_errors(self, net: Network, examples: Batch, reference: Batch) -> Tensor:
        """The weighted squared errors (B, K) of the entries; for the arguments see `loss`."""
        with torch.no_grad():
            target = self.method.target(examples, reference)
            weight = self.method.weight(examples)
        prediction = self.method.predict(conditioned(net, examples.conditions), examples)
        squared = (prediction - target).square()
        return squared if weight is None else weight.to(squared)[:, None] * squared


# training.objective -> the class of the objective.
OBJECTIVES: dict[str, type[Regression]] = {"regression": Regression}


def own_keys(part: type[Regression]) -> list[str]:
    """The keys that an objective reads and plain regression does not."""
    keys = {*of_part(part, "keys"), *of_part(part, "options").values()}
    return sorted(keys - {*Regression.options.values()})


def get_loss_fn(config, method: Method) -> Regression:
    """The objective of `config`: `loss_fn(net, batch, generator=None, step=0)`, a scalar.

    Raises:
        ValueError: `training.small_batch_size` is larger than the batch.
    """
    objective = named(OBJECTIVES, "training.objective", config.training.objective)
    return objective.from_config(config, method)
