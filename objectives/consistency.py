"""Consistency: the network learns the endpoints of its ODE, for samples in a few evaluations.

Consistency models (Song et al. 2023, arXiv 2303.01469), tuned from a denoiser as in "Consistency
Models Made Easy" (Geng et al. 2024, arXiv 2406.14548), for the noise of any number of augmenting
dimensions.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import SHARE, Key, Number, whole
from methods.base import Examples, Method, Network, conditioned, linear, scaled, spread
from objectives.base import Objective
from sources.batch import Batch

KEYS = {
    "consistency.q": Key(
        2.0,
        Number(1.001, 1e6),
        "a training pair has the noise levels t and r = max(0, t (1 - n(t) / q^a)) in stage a; n: "
        "see consistency.k",
    ),
    "consistency.stages": Key(
        8, whole(1, 64), "number of stages a = 1, 2, ...; each brings r closer to t"
    ),
    "consistency.growth": Key(
        1.0,
        SHARE,
        "share of training.n_iters over which the stage rises to the last; 0: the last from the "
        "start",
    ),
    "consistency.k": Key(8.0, Number(0, 1e4), "n(t) = 1 + k sigmoid(-b t) of consistency.q"),
    "consistency.b": Key(1.0, Number(0, 1e4), "see consistency.k", scales="inverse"),
    "consistency.c": Key(
        0.06,
        Number(0, 1e4),
        "pseudo-Huber distance sqrt(|d|^2 + c^2) - c of the two denoised images, d their "
        "difference; 0: |d|, which is biased with training.target='image'",
        scales="level",
    ),
    "consistency.P_mean": Key(
        -1.1,
        Number(-10, 10),
        "mean of ln t, t the larger noise level of a training pair",
        scales="log",
    ),
    "consistency.P_std": Key(2.0, Number(0.001, 4), "standard deviation of ln t"),
}

SMALLEST_SQUARE = 1e-30  # under a root, so that its derivative is finite


@dataclass(frozen=True, kw_only=True)
class LevelPairs(Examples):
    """Images perturbed to noise levels `t`, and smaller levels `r` < t, (B,), float64."""

    r: Tensor


class Consistency(Objective):
    """Distance between the denoised images of one example at two noise levels.

    With the denoiser f, x_t = y + t n and x_r = y + r n of the same image y and noise n of the
    method's kernel, the loss of an example is

        d(f(x_t, t), f(x_r, r)) / (t - r),    d(a, b) = sqrt(|a - b|^2 + c^2) - c,

    averaged over the examples. No gradient flows through f(x_r, r). It has the dropout mask of
    f(x_t, t), and is y where r = 0 (the boundary condition). ln t is normal (P_mean, P_std); in
    stage a = 1, 2, ... of the training

        r = max(0, t (1 - (1 + k sigmoid(-b t)) / q^a)).

    As r approaches t, f(x_t, t) approaches the endpoint of the ODE's trajectory through x_t, since
    E[n | x_t] is the ODE's slope. With training.target='posterior_mean' x_r is an Euler step of
    that ODE: y is replaced by E[y | x_t] over the reference batch, n by (x_t - E[y | x_t]) / t.

    Attributes:
        q, stages, growth, k, b, c, P_mean, P_std: as the keys of these names say.
        n_iters: steps of the training.
    """

    keys = KEYS
    options = {
        **Objective.options,
        **{name.removeprefix("consistency."): name for name in KEYS},
        "n_iters": "training.n_iters",
    }
    predicts_mean = False

    def __init__(
        self,
        method: Method,
        batch_size: int,
        examples: int,
        label_dropout: float = 0.0,
        condition_dropout: float = 0.0,
        *,
        q: float = 2.0,
        stages: int = 8,
        growth: float = 1.0,
        k: float = 8.0,
        b: float = 1.0,
        c: float = 0.06,
        P_mean: float = -1.1,
        P_std: float = 2.0,
        n_iters: int = 1,
    ):
        super().__init__(method, batch_size, examples, label_dropout, condition_dropout)
        if not method.denoises:
            raise ValueError(
                f"training.objective='consistency' needs a denoiser, as of PFGM++ and EDM: the "
                f"network of {method.name} predicts the {method.predicts}"
            )
        self.q, self.stages, self.growth, self.k, self.b, self.c = q, stages, growth, k, b, c
        self.P_mean, self.P_std, self.n_iters = P_mean, P_std, n_iters

    def stage(self, step: int) -> int:
        """The stage a, from 1 on, of training step number `step`, from 0 on."""
        growing = self.growth * self.n_iters
        return min(self.stages, 1 + int(self.stages * step / growing)) if growing else self.stages

    def phase(self, step):
        return f"stage_{self.stage(step)}"

    def smaller_levels(self, t: Tensor, stage: int) -> Tensor:
        """The smaller noise levels r of a `stage`, in the shape of `t`."""
        return (t * (1 - (1 + self.k * torch.sigmoid(-self.b * t)) / self.q**stage)).clamp_min(0)

    def perturb(self, batch, step, generator=None):
        y = batch.images
        draw = {"generator": generator, "device": y.device, "dtype": torch.float64}
        t = (self.P_mean + self.P_std * torch.randn(len(y), **draw)).exp()
        normal, width = self.method.training_noise(batch, generator)
        noise, r = scaled(width, normal), self.smaller_levels(t, self.stage(step))
        x, conditions = y + scaled(t, noise), batch.conditions
        return LevelPairs(images=x, conditions=conditions, t=t, clean=y, noise=noise, r=r)

    def loss(self, net, examples, reference):
        return self.losses(net, examples, reference).mean()

    def losses(self, net: Network, examples: LevelPairs, reference: Batch) -> Tensor:
        """The loss (B,) of each example; for the arguments see `loss`."""
        net, x = conditioned(net, examples.conditions), examples.images
        t, r = examples.t, examples.r
        with torch.no_grad():
            clean = self.method.target_image(examples, x, t, reference)
            x_r = linear(r / t, x - clean, 1, clean)
            with _repeated_dropout(x.device):
                # there is no noise label at r = 0; that output is replaced
                endpoint = self.method.denoise(net, x_r, torch.where(r == 0, t, r))
            endpoint = torch.where(spread(r, x) == 0, clean, endpoint)
        difference = self.method.denoise(net, x, t) - endpoint
        squared = difference.flatten(1).square().sum(1)
        # sqrt(s + c^2) - c, without the difference of like numbers, and with a slope of 0 at s = 0
        root = (squared + self.c**2).clamp_min(SMALLEST_SQUARE).sqrt()
        return squared / (root + self.c) / (t - r).to(squared)


@contextlib.contextmanager
def _repeated_dropout(device: torch.device) -> Iterator[None]:
    """After the `with` block dropout on `device` draws what it drew within it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
