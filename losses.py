"""What a training step minimises: the squared error between a method's prediction and target."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from methods.base import Method, Network
from methods.field import poisson_field, posterior_mean
from sources.batch import Batch

__all__ = ["RegressionLoss", "get_loss_fn", "poisson_field", "posterior_mean"]


class RegressionLoss:
    """The loss of a method; called with a batch, or in steps: `draw` examples, then their `error`.

    Half the sum over the entries of an example, or with `reduce_mean` their mean, of the squared
    error, weighted by the method, averaged over the examples.

    Attributes:
        method: whose loss.
        reduce_mean: see above.
        batch_size: images that a training step takes from the data.
        examples: of these, how many are perturbed; all of them are the reference batch.
        label_dropout: share of the examples that lose their class label, which becomes -1.
    """

    def __init__(
        self,
        method: Method,
        reduce_mean: bool,
        batch_size: int,
        examples: int,
        label_dropout: float = 0.0,
    ):
        self.method, self.reduce_mean, self.examples = method, reduce_mean, examples
        self.label_dropout = label_dropout
        self.batch_size = batch_size if method.uses_reference_batch else examples

    def __call__(
        self, net: Network, batch: Batch | Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss, a scalar, of scaled images (B, C, H, W) or a batch of them."""
        batch = batch if isinstance(batch, Batch) else Batch(batch)
        return self.error(net, self.draw(batch, generator), batch)

    @torch.no_grad()
    def draw(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """The perturbed examples of a training step on `batch`; see `Method.draw`."""
        batch = batch[: self.examples]
        examples = self.method.draw(batch, generator)
        examples = replace(examples, augment_labels=batch.augment_labels)
        if (labels := examples.labels) is None or not self.label_dropout:
            return examples
        # the last draw, so that it changes none of the method's
        uniform = torch.rand(len(labels), generator=generator, device=labels.device)
        return replace(examples, labels=labels.masked_fill(uniform < self.label_dropout, -1))

    def error(self, net: Network, examples: Batch, reference: Batch) -> Tensor:
        """The loss, a scalar, of `examples`, with the targets that `reference` makes."""
        with torch.no_grad():
            target = self.method.target(examples, reference)
            weight = self.method.weight(examples)
        prediction = self.method.predict(partial(net, **examples.conditions), examples)
        squared = (prediction - target).square()
        if weight is not None:
            squared = weight.to(squared)[:, None] * squared
        return squared.mean() if self.reduce_mean else 0.5 * squared.sum(1).mean()


def get_loss_fn(config, method: Method) -> RegressionLoss:
    """The loss of `method`: `loss_fn(net, batch, generator=None)`, a scalar.

    Raises:
        ValueError: `training.small_batch_size` is larger than the batch.
    """
    training = config.training
    if not 0 <= training.small_batch_size <= training.batch_size:
        raise ValueError(
            f"training.small_batch_size must be between 0 and training.batch_size "
            f"({training.batch_size}), not {training.small_batch_size}"
        )
    examples = training.small_batch_size or training.batch_size
    sizes = training.batch_size, examples
    return RegressionLoss(method, training.reduce_mean, *sizes, training.label_dropout)
