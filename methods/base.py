"""The interface of a generative method to the training loop, the samplers and the likelihood.

A method is a path (`alpha`, `sigma`, `time`, the two ends, the law of its noise), what its network
predicts (`precondition`), the times of training (`draw_times`) and the weight of the loss
(`weight`). This module derives everything else from these.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from configs.keys import arguments
from configs.schema import Key
from methods import student_t
from methods.preconditioning import (
    Network,
    Preconditioning,
    equals,
    linear,
    scaled,
    spread,
    with_rate,
)
from sources.batch import Batch
from sources.codec import Codec
from sources.measures import Measures
from sources.opened import OpenedData

__all__ = [
    "Examples",
    "Measures",
    "Method",
    "Network",
    "Preconditioning",
    "WithSlope",
    "conditioned",
    "equals",
    "linear",
    "noise_like",
    "scaled",
    "spread",
    "with_rate",
]


def noise_like(
    x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """Standard normal noise of the shape, device and dtype of `x` (B, ...).

    Of several generators, one for each row of `x`, each draws its row.
    """
    if isinstance(generator, Sequence):
        rows = zip(x.split(1), generator, strict=True)
        return torch.cat([noise_like(row, each) for row, each in rows])
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def conditioned(net: Network, conditions: dict[str, Tensor | None]) -> Network:
    """`net` with the `conditions` bound by name; None leaves a condition out."""
    return partial(net, **{name: value for name, value in conditions.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Examples(Batch):
    """Images perturbed to the times `t` (B,): x = alpha `clean` + std `noise`, (B, C, H, W)."""

    t: Tensor
    clean: Tensor
    noise: Tensor


class Method(abc.ABC):
    """A generative method: a path from data to noise, and what the network predicts along it.

    At time t an image y has become

        x = alpha(t) y + std(t) n,    n of a Student t,

    and sampling follows the ODE dx/dt from `t_prior` to `t_data`. Solvers with fixed steps use
    natural variables, in which its solutions are straightest: x / alpha over the noise level
    sigma = std / alpha. Their slope is (x / alpha - E[y | x]) / sigma.

    A subclass gives `sigma`, `time` and `precondition`, and `alpha` where it is not 1; its numbers
    are dataclass fields, which `options` connects with keys. Times and noise levels are tensors of
    any shape, float64 where accuracy matters.

    Attributes:
        keys: the keys that the method declares, for `configs.default`.
        options: {field: the key that it is read from}.
        predicts: the prediction that `precondition` makes of the network's output, for
            x = alpha y + std n: "noise" n, "image" y, "velocity" dx/dt = alpha' y + std' n, or
            "score" -n / std.
        extra_channels: channels that the network gives beyond those of the image.
        uses_reference_batch: true where `target` depends on the reference batch.
        follows_lines: true where samples follow lines through (x, z), and no ODE over noise levels.
        t_prior, t_data: times at which sampling starts and ends.
        level_name: name of the quantity by which samplers report their progress.
        gives_score: true where the network gives the score, which may be divided by sigma inside
            it (`model.scale_by_sigma`).
        positive_labels: true where noise labels are > 0, and a "fourier" embedding takes their log.
        denoises: true where `denoise` is as accurate as the network at every noise level.
        gaussian: true where Gaussian noise of variance b^2 - a^2 takes y from the noise level a up
            to b, exactly or nearly, so that a sampler can add noise.
        sigma_data: standard deviation of the scaled images' entries, as far as it is known.
        sigma_unit: unit of noise levels, 1 where they are meant for images in [-1, 1].
        degrees_of_freedom: of the Student t that is the noise at a noise level; inf: Gaussian.
        alpha_data: factor of the data in the x from which the ODE leads to the prior; 1, as
            published, where alpha(t_data) is nearly 1.
        noisy_end: true where samples at `t_data` have noise, which a step to sigma = 0 removes.
        predictors, correctors: names that `sampling.method='pc'` can use; none without an SDE.
    """

    keys: ClassVar[Mapping[str, Key]] = {}
    options: ClassVar[Mapping[str, str]] = {}
    predicts: str = "noise"
    extra_channels: ClassVar[int] = 0
    uses_reference_batch: bool = False
    follows_lines: ClassVar[bool] = False
    level_name: ClassVar[str] = "noise level"
    gives_score: ClassVar[bool] = False
    positive_labels: ClassVar[bool] = True
    denoises: ClassVar[bool] = False
    gaussian: bool = False
    sigma_data: float = 0.5
    sigma_unit: float = 1.0
    degrees_of_freedom: float = math.inf
    alpha_data: float = 1.0
    noisy_end: bool = True
    predictors: tuple[str, ...] = ()
    correctors: tuple[str, ...] = ()
    t_prior: float
    t_data: float
    precondition: Preconditioning

    @property
    def name(self) -> str:
        """Name of the method in papers."""
        return type(self).__name__

    def __repr__(self) -> str:
        """Class and numbers, by which results of different methods are told apart."""
        numbers = ", ".join(f"{field}={getattr(self, field)!r}" for field in self.options)
        return f"{type(self).__name__}({numbers})"

    @classmethod
    def from_config(cls, config) -> Self:
        """The method with the numbers of `config`; ValueError where they contradict each other."""
        return cls(**arguments(cls, config))

    @classmethod
    def measure(cls, values: Mapping[str, Any], dim: int, data: Measures) -> dict[str, Any]:
        """Values, by key, that the config leaves open and that are measured from the data.

        Args:
            values: the config, flat.
            dim: entries of an image.
            data: measures the training images.
        """
        return {}

    def with_data(self, data: OpenedData, codec: Codec) -> Self:
        """The method for the experiment's `data`; most methods do not depend on data."""
        return self

    def origin(self) -> dict[str, str]:
        """Text by name for what samples depend on besides the method's numbers and the network."""
        return {}

    @classmethod
    def check_ode(cls, feature: str) -> None:
        """Raise ValueError unless the method has an ODE over noise levels, as `feature` needs."""
        if cls.follows_lines:
            raise ValueError(
                f"{feature} needs noise levels and their ODE, and {cls.__name__} has none: its "
                "samples follow field lines from one data set to another"
            )

    def check_conditions(self, names: Sequence[str]) -> None:
        """Raise ValueError where the network cannot be given the conditions called `names`."""
        return

    def check_measured(self, *names: str) -> None:
        """Raise ValueError, in one line, where one of the fields `names` is still open."""
        for name in names:
            if getattr(self, name) is None:
                key = self.options[name]
                raise ValueError(f"{key} is open: training measures it at its first start")

    def check_rising(self, low: str, high: str, equal: bool = False) -> None:
        """Raise ValueError unless the fields `low` and `high` are positive and rise.

        With `equal` they may also be the same.
        """
        first, last = getattr(self, low), getattr(self, high)
        if not (0 < first < last or equal and 0 < first == last):
            low, high = self.options[low], self.options[high]
            raise ValueError(f"{low} must lie between 0 and {high}: {first} and {last} do not")

    # --- the path ---

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the data in x at time `t`, of the shape of `t`."""
        return torch.ones_like(t)

    @abc.abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The noise level of x / alpha at time `t`."""

    @abc.abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The time of noise level `sigma`, the inverse of `sigma(t)`."""

    @property
    def level_range(self) -> tuple[float, float]:
        """Lowest and highest noise level: those where sampling ends and starts."""
        times = torch.tensor([self.t_data, self.t_prior], dtype=torch.float64)
        return tuple(self.sigma(times).tolist())

    def std(self, t: Tensor) -> Tensor:
        """The scale of the noise in x at time `t`."""
        return self.alpha(t) * self.sigma(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of x and of the slope in dx/dt at `t`: alpha'/alpha, and alpha sigma'."""
        alpha, alpha_rate = with_rate(self.alpha, t)
        return alpha_rate / alpha, alpha * with_rate(self.sigma, t)[1]

    def noise(
        self, x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw n in the shape of `x`: normal noise, and the factor (B,) by which it becomes n.

        Of several generators, one for each row of `x`, each draws its row.
        """
        if isinstance(generator, Sequence):
            rows = zip(x.split(1), generator, strict=True)
            draws = [self.noise(row, each) for row, each in rows]
            return tuple(map(torch.cat, zip(*draws, strict=True)))
        normal, draw = noise_like(x, generator), {"generator": generator, "device": x.device}
        return normal, student_t.inverse_root_gamma(len(x), self.degrees_of_freedom, **draw)

    def training_noise(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The noise of a training step, in the form of `noise`: here independent of the images."""
        return self.noise(batch.images, generator)

    def check_kernel(self, feature: str) -> None:
        """Raise ValueError where noise depends on the image and `feature` assumes otherwise."""
        return

    def perturb_at(
        self, images: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """A sample x (B, C, H, W) of `images` perturbed to times `t`, () or (B,)."""
        t = torch.as_tensor(t, dtype=torch.float64, device=images.device)
        normal, width = self.noise(images, generator)
        return scaled(self.alpha(t), images) + scaled(self.std(t) * width, normal)

    def kernel(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and std at time `t` with which the network is trained."""
        return self.alpha(t), self.std(t)

    def check_likelihood(self) -> None:
        """Raise ValueError where the ODE is not known at all times."""
        return

    # --- training ---

    def draw_times(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Times (n,), float64, of a training step: here uniform from `t_data` to `t_prior`."""
        t = torch.rand(n, dtype=torch.float64, generator=generator, device=device)
        return self.t_data + (self.t_prior - self.t_data) * t

    def reference(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """The reference batch of a training step on `batch`; by default `batch` itself."""
        return batch

    def draw(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """The examples of a training step: scaled images, perturbed at random noise levels.

        There are as many as images, with all that `target` and `predict` need of each.
        """
        y = batch.images
        t = self.draw_times(len(y), generator, y.device)
        normal, width = self.training_noise(batch, generator)
        alpha, std = self.kernel(t)
        x = scaled(alpha, y) + scaled(std * width, normal)
        noise = scaled(width, normal)
        return Examples(images=x, conditions=batch.conditions, t=t, clean=y, noise=noise)

    def target_image(self, examples: Batch, y: Tensor, sigma: Tensor, reference: Batch) -> Tensor:
        """The denoised image (B, C, H, W) that is learned at `y` and levels `sigma` (B,).

        Here the clean image; `reference` as in `target`.
        """
        return examples.clean

    def target(self, examples: Batch, reference: Batch) -> Tensor:
        """The target (B, K) of the prediction for `examples`, of the kind `predicts`.

        Targets that depend on other images take them from the batch `reference` of clean images;
        with labels, only from the example's class (`methods.field.own_class`).
        """
        if self.predicts == "noise":
            return examples.noise.flatten(1)
        if self.predicts == "image":
            return examples.clean.flatten(1)
        if self.predicts == "score":
            return (-examples.noise / spread(self.std(examples.t), examples.noise)).flatten(1)
        _, alpha_rate = with_rate(self.alpha, examples.t)
        _, std_rate = with_rate(self.std, examples.t)
        return (scaled(alpha_rate, examples.clean) + scaled(std_rate, examples.noise)).flatten(1)

    def predict(self, net: Network, examples: Batch) -> Tensor:
        """The prediction (B, K) for `examples` of `net`, to which their conditions are bound."""
        return self.precondition(net, examples.images, examples.t).flatten(1)

    def weight(self, examples: Batch) -> Tensor | None:
        """The weight (B,) of each example's squared error in the loss; None for 1."""
        return None

    # --- sampling ---

    def slope_factors(self, t: Tensor) -> tuple[Tensor, Tensor | float]:
        """a and b at time `t` of the slope a y + b F, where F is the output of the network.

        The slope is the predicted noise n, which follows from another prediction at x = alpha y:

            image D       n = (y - D) / sigma
            score s       n = -alpha sigma s
            velocity v    n = (v - alpha' y) / (alpha sigma').
        """
        alpha, sigma = self.alpha(t), self.sigma(t)
        skip, out = alpha * self.precondition.c_skip(t), self.precondition.c_out(t)
        if self.predicts == "noise":
            return skip, out
        if self.predicts == "image":
            return (1 - skip) / sigma, -out / sigma
        if self.predicts == "score":
            return -alpha * sigma * skip, -alpha * sigma * out
        of_state, of_slope = self.rates(t)  # alpha' / alpha and alpha sigma'
        return (skip - alpha * of_state) / of_slope, out / of_slope

    def slope(self, net: Network, y: Tensor, sigma: float | Tensor) -> Tensor:
        """dy/dsigma (B, C, H, W) at y = x / alpha and noise level `sigma` (a float or 0-d tensor).

        It is the predicted noise (Karras et al. 2022, arXiv 2206.00364).
        """
        t = self.time(torch.as_tensor(sigma, dtype=torch.float64))
        of_state, of_output = self.slope_factors(t)
        output = net(*self.precondition.inputs(scaled(self.alpha(t), y), t))
        return linear(of_state, y, of_output, output)

    def ode(self, net: Network, x: Tensor, t: float | Tensor) -> Tensor:
        """The sampling ODE's dx/dt (B, C, H, W) at `x` and time `t` (a float or 0-d tensor)."""
        t = torch.as_tensor(t, dtype=torch.float64)
        of_state, of_slope = self.rates(t)
        slope = self.slope(net, x / spread(self.alpha(t), x), self.sigma(t))
        return spread(of_state, x) * x + spread(of_slope, x) * slope

    def score(self, net: Network, x: Tensor, t: Tensor) -> Tensor:
        """The predicted score, the gradient of log p_t at `x` (B, C, H, W) and a time `t` ()."""
        slope = self.slope(net, x / spread(self.alpha(t), x), self.sigma(t))
        return -slope / spread(self.std(t), x)

    def denoise(
        self, net: Network, y: Tensor, sigma: float | Tensor, **conditions: Tensor | None
    ) -> Tensor:
        """The denoised images (B, C, H, W) of `y` at noise level `sigma`: an Euler step to 0.

        `sigma` is one level, or one for each image (B,). `conditions` of the network, such as
        `class_labels` (B,), go by name; None is none.
        """
        slope = self.slope(conditioned(net, conditions), y, sigma)
        return y - (spread(sigma, y) if isinstance(sigma, Tensor) else sigma) * slope

    # --- the prior ---

    @property
    def prior_scale(self) -> float:
        """The scale of the prior, which is the noise at `t_prior`."""
        return self.std(torch.tensor(self.t_prior, dtype=torch.float64)).item()

    def prior_sampling(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of `shape` (B, C, H, W) from the distribution at `t_prior`."""
        normal, width = self.noise(torch.empty(shape, device=device), generator)
        return scaled(self.prior_scale * width, normal)

    def prior_norms(self, dim: int) -> tuple[float, float]:
        """Lowest and highest norm of a prior sample of `dim` entries when it is rescaled.

        The highest is the typical norm of a Gaussian prior; with small D many samples exceed it.
        """
        typical = self.prior_scale * math.sqrt(dim)
        return typical / 2, typical

    def prior_logp(self, x: Tensor) -> Tensor:
        """Log density (B,), in nats, of `x` (B, C, H, W) under the distribution at `t_prior`."""
        return student_t.log_density(x, self.prior_scale, self.degrees_of_freedom)


def _of_method(name: str) -> property:
    """An attribute of `WithSlope` that is the attribute `name` of its method."""
    return property(lambda self: getattr(self.method, name))


class WithSlope(Method):
    """A method with another slope, which a subclass defines; path, noise and prior stay.

    `ode`, `score` and `denoise` are derived from the new slope.
    """

    name, gaussian = _of_method("name"), _of_method("gaussian")
    alpha, sigma, std = _of_method("alpha"), _of_method("sigma"), _of_method("std")
    time, t_prior, t_data = _of_method("time"), _of_method("t_prior"), _of_method("t_data")
    degrees_of_freedom, noisy_end = _of_method("degrees_of_freedom"), _of_method("noisy_end")
    perturb_at, prior_sampling = _of_method("perturb_at"), _of_method("prior_sampling")
    prior_logp, prior_norms = _of_method("prior_logp"), _of_method("prior_norms")
    sigma_unit, alpha_data = _of_method("sigma_unit"), _of_method("alpha_data")

    def __init__(self, method: Method):
        self.method = method

    @abc.abstractmethod
    def slope(self, net: Network, y: Tensor, sigma: float | Tensor) -> Tensor: ...
