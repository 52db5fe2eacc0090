"""What a generative method tells the training loop, the samplers and the likelihood."""

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sources.batch import Batch

# (x (B, C, H, W), noise_label (B,)) -> a tensor, or the Poisson field. Further conditions, such as
# class labels, are keyword arguments, which the loss binds.
Network = Callable[..., Tensor | tuple[Tensor, Tensor]]


def spread(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient, one for all images () or one each (B,), so that it multiplies `x` (B, ...).

    It may lie on the CPU where `x` does not; then the host does not wait for the copy.
    """
    return c.to(x, non_blocking=True).view(-1, *[1] * (x.dim() - 1))


def noise_like(
    x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """Standard normal noise of the shape, device and dtype of `x` (B, ...).

    Of several generators, one for each row of `x`, each draws its row.
    """
    if isinstance(generator, Sequence):
        rows = zip(x.split(1), generator, strict=True)
        return torch.cat([noise_like(row, own) for row, own in rows])
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def conditioned(net: Network, conditions: dict[str, Tensor | None]) -> Network:
    """`net` that is given the `conditions`, by name, in every call; those that are None are not."""
    return partial(net, **{name: value for name, value in conditions.items() if value is not None})


def rising(config, low: str, high: str, equal: bool = False) -> tuple[float, float]:
    """The values of two keys, such as "model.sigma_min", that must be positive and rise.

    Raises:
        ValueError: they do not; with `equal` they may also be the same.
    """
    first, last = (config[section][name] for section, name in (low.split("."), high.split(".")))
    if not (0 < first < last or equal and 0 < first == last):
        raise ValueError(f"{low} must lie between 0 and {high}: {first} and {last} do not")
    return first, last


@dataclass(frozen=True)
class Preconditioning:
    """What stands between a method and its network F: c_skip x + c_out F(c_in x, c_noise).

    Each coefficient is a function of the method's time or noise level `t`, () or (B,), that gives a
    tensor of the same shape. Without c_skip there is no first term; c_in and c_out left out are 1,
    and then the output of F may be of any kind. (Karras et al. 2022, arXiv 2206.00364, equation 7
    and table 1.)
    """

    c_noise: Callable[[Tensor], Tensor]
    c_in: Callable[[Tensor], Tensor] | None = None
    c_out: Callable[[Tensor], Tensor] | None = None
    c_skip: Callable[[Tensor], Tensor] | None = None

    def __call__(self, net: Network, x: Tensor, t: Tensor):
        """The preconditioned output of `net` at `x` (B, C, H, W) and `t`."""
        label = self.c_noise(t)
        dtype = x.dtype if label.is_floating_point() else label.dtype
        label = label.to(x.device, dtype, non_blocking=True).expand(len(x))
        out = net(x if self.c_in is None else spread(self.c_in(t), x) * x, label)
        if self.c_out is not None:
            out = spread(self.c_out(t), x) * out
        return out if self.c_skip is None else spread(self.c_skip(t), x) * x + out


class Method(abc.ABC):
    """A way to generate: how data are perturbed, what the network learns, and how it samples.

    Training asks for `draw`, `target` and `predict`. Sampling follows the ODE `dx/dt` from
    `t_prior` to `t_data`. Solvers with given steps see it in natural variables, in which its
    solutions are straightest: x = alpha(t) y over the noise level sigma(t), with slope dy/dsigma
    and denoised image y - sigma dy/dsigma.

    Times and noise levels are tensors of any shape, float64 where accuracy matters.

    Attributes:
        extra_channels: channels that the network gives beyond those of the image.
        uses_reference_batch: `target` depends on the reference batch.
        t_prior, t_data: where sampling starts and ends.
        gives_score: the network gives the score, which `model.scale_by_sigma` divides by sigma.
        positive_labels: noise labels are > 0, so that a "fourier" embedding can take their log.
        gaussian: Gaussian noise of variance b^2 - a^2 takes y from the noise level a up to b,
            exactly or nearly, so that a sampler can add some.
        degrees_of_freedom: of the Student t that is the noise at a noise level; inf: Gaussian.
        noisy_end: samples at `t_data` still have noise, which one more step to sigma = 0 removes.
        predictors, correctors: those that `sampling.method='pc'` can take; none without an SDE.
    """

    extra_channels: ClassVar[int] = 0
    uses_reference_batch: bool = False
    gives_score: ClassVar[bool] = False
    positive_labels: ClassVar[bool] = True
    gaussian: ClassVar[bool] = False
    degrees_of_freedom: float = math.inf
    noisy_end: ClassVar[bool] = False
    predictors: ClassVar[tuple[str, ...]] = ()
    correctors: ClassVar[tuple[str, ...]] = ()
    t_prior: float
    t_data: float

    @property
    def name(self) -> str:
        """What its paper calls it, for people to read."""
        return type(self).__name__

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config) -> Self:
        """The method with the numbers of `config`; ValueError where they contradict each other."""

    @classmethod
    def measure(cls, config, mean_norm: Callable[[], float]) -> dict[str, Any]:
        """Values, by config key, of what `config` leaves open and the data decide.

        `mean_norm()` measures the mean Euclidean norm of the scaled training images.
        """
        return {}

    # --- training ---

    @abc.abstractmethod
    def draw(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """The examples of a training step: scaled images, perturbed at random noise levels.

        Returns:
            As many rows as `batch` has: perturbed images, labels, and what else `target` and
            `predict` need of each example.
        """

    @abc.abstractmethod
    def target(self, examples: Batch, reference: Batch) -> Tensor:
        """What the network should predict for `examples`, (B, K).

        `reference` is the batch of clean images that makes targets which depend on other images;
        with labels, those of the example's class (`methods.field.own_class`).
        """

    @abc.abstractmethod
    def predict(self, net: Network, examples: Batch) -> Tensor:
        """What `net` predicts for `examples`, (B, K); it has been given their conditions."""

    def weight(self, examples: Batch) -> Tensor | None:
        """The weight (B,) of each example's squared error in the loss; None for 1."""
        return None

    # --- sampling ---

    @abc.abstractmethod
    def ode(self, net: Network, x: Tensor, t: float | Tensor) -> Tensor:
        """The sampling ODE's dx/dt (B, C, H, W) at `x` and time `t` (a float or 0-d tensor)."""

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the data in x at time `t`, of the shape of `t`."""
        return torch.ones_like(t)

    @abc.abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The noise level of y = x / alpha at time `t`."""

    @abc.abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The time of noise level `sigma`, the inverse of `sigma(t)`."""

    @abc.abstractmethod
    def slope(self, net: Network, y: Tensor, sigma: float | Tensor) -> Tensor:
        """dy/dsigma (B, C, H, W) at `y` and noise level `sigma` (a float or 0-d tensor)."""

    def denoise(
        self, net: Network, y: Tensor, sigma: float | Tensor, **conditions: Tensor | None
    ) -> Tensor:
        """The denoised images (B, C, H, W) of `y` at noise level `sigma`: an Euler step to 0.

        Further `conditions` of the network, such as `class_labels` (B,), go by name; None is none.
        """
        return y - sigma * self.slope(conditioned(net, conditions), y, sigma)

    @abc.abstractmethod
    def perturb_at(
        self, images: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """A sample x (B, C, H, W) at times `t`, () or (B,), of what `images` become there."""

    @abc.abstractmethod
    def prior_sampling(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of `shape` (B, C, H, W) from the distribution at `t_prior`."""

    @abc.abstractmethod
    def prior_norms(self, dim: int) -> tuple[float, float]:
        """From where to where rescaling a prior sample of `dim` entries changes its image."""

    @abc.abstractmethod
    def prior_logp(self, x: Tensor) -> Tensor:
        """Log density (B,), in nats, of `x` (B, C, H, W) under the distribution at `t_prior`."""
