"""Multistep consistency sampling: denoise a prior sample, then add noise and denoise again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from configs.schema import NOISE_LEVEL, REFERENCE_STD, Key, Numbers
from methods.base import Method, Network, scaled, spread
from samplers import base, start
from samplers.base import Sampler
from solvers.base import Callback, Counted, FiniteStates, Step, Watch

MOST_EVALUATIONS = 8
# Default levels for data of standard deviation 0.5: the first is that of Geng et al. (2024, arXiv
# 2406.14548) for two evaluations on CIFAR-10; each further one is 0.4 of the one before, a choice
# made here.
FIRST_LEVEL, FALL = 0.821, 0.4

KEYS = {
    "sampling.levels": Key(
        (),
        Numbers(NOISE_LEVEL, range(MOST_EVALUATIONS)),
        "of 'consistency': falling noise levels of evaluations 2 to N; (): chosen from a grid, "
        "once for a checkpoint, so that samples are closest to the training images",
        scales="level",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ConsistencySampler(Sampler):
    """Multistep consistency sampling, at falling noise levels.

    Attributes:
        n: evaluations, `sampling.N`.
        levels: noise levels of the n - 1 evaluations after the first, falling; () where they have
            to be chosen for the network.
    """

    n: int = 2
    levels: tuple[float, ...] = ()

    follows_ode = False
    keys = KEYS | base.KEYS | start.KEYS
    reads = {"sampling.N": None}
    options = Sampler.options | {"n": "sampling.N", "levels": "sampling.levels"}

    @classmethod
    def words(cls, values):
        levels = ", ".join(f"{float(level):.3g}" for level in values.get("levels") or ())
        return "consistency", *([f"noise levels {levels}"] if levels else [])

    def check(self):
        if self.measurement is not None:
            raise ValueError(
                "a restorer changes the ODE's slope, which a network of "
                "training.objective='consistency' does not have"
            )
        if not 1 <= self.n <= MOST_EVALUATIONS:
            raise ValueError(
                f"sampling.method='consistency' takes 1 to {MOST_EVALUATIONS} evaluations, not "
                f"sampling.N={self.n}: are steps of the ODE meant, with a network of "
                "training.objective='regression'?"
            )
        if self.start and self.is_fitted:
            raise ValueError(
                "sampling.init='condition' with sampling.N above 1 needs sampling.levels, noise "
                "levels that fall from sampling.init_level"
            )
        if self.n > 1:
            self.method.check_kernel(f"the noise of sampling.N={self.n} evaluations")
        if not self.levels:
            return
        low, high = self.method.level_range
        high = self.start.level if self.start else high
        falls = all(a > b for a, b in zip((high, *self.levels), (*self.levels, 0)))  # noqa: B905
        if len(self.levels) != self.n - 1 or not falls or min(self.levels) < low:
            raise ValueError(
                f"sampling.levels={self.levels} must be sampling.N - 1 = {self.n - 1} noise levels "
                f"that fall between {high:g} and {low:g}"
            )

    @property
    def scale(self) -> float:
        """Factor of noise levels that belong to data of standard deviation 0.5."""
        return self.method.sigma_data / REFERENCE_STD

    @property
    def is_fitted(self) -> bool:
        return self.n > 1 and not self.levels

    @property
    def couples_samples(self) -> bool:
        return False

    @property
    def tells_times(self) -> bool:
        return False

    @property
    def integrate(self):
        if self.is_fitted:
            raise ValueError(
                "sampling.levels=() are chosen for a network, by Experiment.fitted_sampler"
            )
        return partial(sample_consistency, levels=self.levels)

    def without_fit(self):
        """The sampler with default levels in place of levels chosen for a network."""
        if not self.is_fitted:
            return self
        low, high = self.method.level_range
        first = min(FIRST_LEVEL * self.scale, 0.9 * high)
        fall = max(FALL, (low / first) ** (1 / (self.n - 1)))
        return replace(self, levels=tuple(first * fall**k for k in range(self.n - 1)))


def sample_consistency(
    method: Method,
    net: Network,
    x: Tensor,
    *,
    levels: Sequence[float] = (),
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, int]:
    """Denoise `x` (B, C, H, W), a sample of the prior; then add noise and denoise at each level.

    This is multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1), with
    noise of the method's kernel.

    Args:
        method, net: of the denoiser.
        levels: falling noise levels.
        generator: source of the noise.
        callback, watch: see `solvers.base`; the slope that a step tells is (x - denoised) / level.

    Returns:
        The sample, and the number of network evaluations.

    Raises:
        FloatingPointError: the sample is not finite.
    """
    denoise = Counted(partial(method.denoise, net), watch, FiniteStates())
    prior = torch.tensor(method.t_prior, dtype=torch.float64)
    y = x / spread(method.alpha(prior), x)
    for i, level in enumerate((method.sigma(prior).item(), *levels)):
        if i:
            normal, width = method.noise(y, generator)
            y = y + scaled(level * width, normal)
        denoised = denoise(y, level)
        if callback:
            callback(Step(i, level, y, (y - denoised) / level))
        y = denoised
    denoise.states.note(y, level)
    denoise.states.check()
    return y, denoise.calls
