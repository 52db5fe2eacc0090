"""Likelihood of data under a method's ODE, by the instantaneous change of variables."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.keys import arguments, check_positive, named
from configs.schema import Key, OneOf
from losses import objective_named
from methods.base import Method, Network, conditioned, noise_like
from solvers.base import Counted, Watch
from solvers.rk45 import limits_of, rk45
from solvers.solve import watch_times
from sources.codec import Codec
from sources.codec import from_config as get_codec


def rademacher(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One probe for each `x` (B, C, H, W), (1, B, C, H, W): +1 or -1 with probability 1/2."""
    signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device, dtype=torch.int8)
    return (2 * signs - 1).to(x.dtype)[None]


def gaussian(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One probe for each `x` (B, C, H, W), (1, B, C, H, W): standard normal noise."""
    return noise_like(x, generator)[None]


def unit_vectors(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The D = C H W unit vectors, (D, 1, C, H, W); nothing is drawn."""
    dim = x[0].numel()
    return torch.eye(dim, dtype=x.dtype, device=x.device).view(dim, 1, *x.shape[1:])


# eval.divergence -> probes for `log_likelihood`.
DIVERGENCES = {"rademacher": rademacher, "gaussian": gaussian, "exact": unit_vectors}


def log_likelihood(
    method: Method,
    net: Network,
    x: Tensor,
    probes: Tensor,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_evaluations: int = 10_000,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Log density of `x` under the distribution that the sampling ODE makes of the prior.

    log p(x_0) = log p_prior(x_T) + integral of div(dx/dt) dt from data to prior (Chen et al. 2018,
    arXiv 1806.07366), the divergence a sum over probes of probe . d(dx/dt . probe)/dx: exact for
    the unit vectors, an unbiased estimate for one random probe (Hutchinson; Grathwohl et al. 2019,
    arXiv 1810.01367).

    Args:
        method, net: whose ODE.
        x: scaled images (B, C, H, W).
        probes: (K, B or 1, C, H, W): the unit vectors, or one of mean 0 and covariance I.
        rtol, atol, max_evaluations: see `rk45`.
        watch: called before each evaluation; see `solvers.base.Watch`.

    Returns:
        log p (B,) in nats, the latent at the prior (B, C, H, W), and the number of evaluations of
        dx/dt, each with K backward passes. Where `x` requires a gradient, they have one with
        respect to it, at the memory of all evaluations.

    Raises:
        FloatingPointError: the solution is not finite; the message says where.
        TooManyEvaluations: it needs more than `max_evaluations`.
    """

    differentiable = x.requires_grad and torch.is_grad_enabled()
    graph_options = {"retain_graph": True, "create_graph": differentiable}

    def drift_and_divergence(state: Tensor, t: float) -> Tensor:
        with torch.enable_grad():
            x_t = state[:, :-1].view_as(x).requires_grad_()
            drift = method.ode(net, x_t, t)
            divergence = sum(
                probe * torch.autograd.grad((drift * probe).sum(), x_t, **graph_options)[0]
                for probe in probes
            )
            rates = torch.cat([drift.flatten(1), divergence.flatten(1).sum(1, keepdim=True)], 1)
        return rates if differentiable else rates.detach()

    # of PyTorch's kernels of attention only this one can be differentiated twice
    twice = sdpa_kernel(SDPBackend.MATH) if differentiable else contextlib.nullcontext()
    with torch.set_grad_enabled(differentiable), twice:
        alpha, dim = method.alpha_data, x[0].numel()
        start = torch.cat([alpha * x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
        times = torch.tensor([method.t_data, method.t_prior], dtype=torch.float64)
        flow = Counted(drift_and_divergence, watch_times(method, watch))
        end = rk45(flow, start, times, rtol=rtol, atol=atol, max_evaluations=max_evaluations)
        latent, change = end[:, :-1].view_as(x), end[:, -1]
        log_p = method.prior_logp(latent) + change + dim * math.log(alpha)
        return log_p, latent, flow.calls


class Unit(NamedTuple):
    """A unit of likelihoods, which are negative log densities per entry.

    It is called `key` in reports and `name` in sentences, and is `nats` nats.
    """

    key: str
    name: str
    nats: float


BITS, NATS = Unit("bpd", "bits/dim", math.log(2)), Unit("nats", "nats per entry", 1.0)


def unit_of(codec: Codec) -> Unit:
    """Bits/dim of images in grey levels; of other arrays nats, in their own units."""
    return NATS if codec.levels is None else BITS


def log_posterior(nats: Tensor, dim: int, prior: Tensor) -> Tensor:
    """log p(label | image) (B, K) by Bayes' rule, in nats.

    Args:
        nats: negative log-likelihoods (B, K) of an entry of each image given each of K labels.
        dim: of how many entries an image consists.
        prior: p(label) (K,), up to a factor.
    """
    return (prior.log() - nats * dim).log_softmax(1)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Bits per dimension of data under a method's ODE, or nats: the `unit_of` the codec.

    Attributes:
        method: whose ODE.
        codec: between stored data and the method's x.
        divergence: a name in `DIVERGENCES`.
        rtol, atol, max_evaluations: see `log_likelihood`.
    """

    method: Method
    codec: Codec
    divergence: str = "rademacher"
    rtol: float = 1e-4
    atol: float = 1e-4
    max_evaluations: int = 10_000

    keys = {
        "eval.divergence": Key(
            "rademacher",
            OneOf(registry="likelihood.DIVERGENCES"),
            "probe of the divergence in likelihoods: random signs, 'gaussian', or 'exact', with "
            "C * H * W probes",
        )
    }
    options = {
        "divergence": "eval.divergence",
        **{name: f"sampling.{name}" for name in ("rtol", "atol", "max_evaluations")},
    }

    def __post_init__(self):
        named(DIVERGENCES, "eval.divergence", self.divergence)
        check_positive(self, "rtol", "atol", "max_evaluations")
        self.method.check_likelihood()
        if self.codec.log_volume is None:
            raise ValueError(
                "images have no likelihood when the network sees latents of an autoencoder "
                "(data.codec): set eval.enable_bpd and eval.enable_classification to False"
            )

    @classmethod
    def from_config(cls, config, method: Method, codec: Codec) -> Self:
        """The likelihood of `method`; ValueError where it has none, or a number is out of range."""
        objective_named(config.training.objective).check_ode("the likelihood")
        return cls(method=method, codec=codec, **arguments(cls, config))

    def __call__(
        self,
        net: Network,
        data: Tensor,
        generator: torch.Generator | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """Bits/dim or nats (B,), latents (B, C, H, W) and the number of evaluations.

        Args:
            net: the network.
            data: encoded, uniformly dequantised data (B, C, H, W).
            generator: draws the probe.
            conditions: what the network is given, rows (B, ...) by name.
            watch: see `solvers.base.Watch`.
        """
        net = conditioned(net, conditions or {})
        probes = named(DIVERGENCES, "eval.divergence", self.divergence)(data, generator)
        log_p, latent, evaluations = log_likelihood(
            self.method, net, data, probes, watch=watch, **limits_of(self)
        )
        nats = unit_of(self.codec).nats
        offset = math.log2(self.codec.levels or 1) - self.codec.log_volume / nats
        return -log_p / (data[0].numel() * nats) + offset, latent, evaluations


def passes_of(split: str, repeats: int) -> int:
    """Passes of likelihoods over a split: several over the test split only."""
    return repeats if split == "test" else 1


def get_likelihood_fn(config, method: Method) -> Likelihood:
    """The likelihood of `method`, in bits per dimension or nats; see `Likelihood.__call__`.

    Raises ValueError as `Likelihood.from_config` does.
    """
    return Likelihood.from_config(config, method, get_codec(config))
