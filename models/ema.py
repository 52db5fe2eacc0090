"""EMA weights: kept in training, and of any length rebuilt from power-function averages.

A power-function average of exponent g weighs the weights of step s in proportion to s^g, so that
its length grows with the training (Karras et al. 2024, EDM2, arXiv 2312.02696, section 3). After t
steps its profile is p(s) = (g + 1) s^g / t^(g + 1) for s from 0 to t, whose standard deviation is a
fixed share of t, its relative width. Two of them, kept in several checkpoints, span profiles of
other widths.
"""

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn


def rise_of_edm(k: int) -> float:
    """Decay at update k >= 1 of a half-life of 5 % of the images before it (arXiv 2206.00364)."""
    return 0.5 ** (20 / (k - 1)) if k > 1 else 0.0


def exponent_of(std: float) -> float:
    """The exponent g whose relative width is `std`, in (0, 0.28] (EDM2, section 3.1).

    It solves std^2 = (g + 1) / ((g + 2)^2 (g + 3)).
    """
    return np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()


def rise_of_power(std: float) -> Callable[[int], float]:
    """Decay at update k >= 1 of the power-function average of relative width `std`.

    With it the weight of step s after k updates is the integral of the profile from s - 1 to s.
    """
    exponent = exponent_of(std)
    return lambda k: (1 - 1 / k) ** (exponent + 1)


def products(
    t: np.ndarray | int, g: np.ndarray | float, u: np.ndarray | int, h: np.ndarray | float
) -> np.ndarray:
    """Inner products of the profiles of exponents `g` after `t` steps and `h` after `u` steps.

    Arguments broadcast; the result is float64, of their shape.
    """
    t, g, u, h = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (t, g, u, h)))
    end = np.minimum(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (end / t) ** g * (end / u) ** h * end / (t * u)


def rebuilding_weights(
    steps: np.ndarray, stds: np.ndarray, step: int, std: float
) -> tuple[np.ndarray, float]:
    """Weights (n,) of n averages whose sum comes closest to that of width `std` after `step` steps.

    They are the least squares of profiles (EDM2, section 3.2), among weights of sum 1. The paper
    does not ask for that sum; with it, weights that training does not move are not scaled, and the
    error with few checkpoints is several times smaller.

    Args:
        steps, stds: step and relative width of each average, (n,), at least 1 of them.
        step, std: of the EMA that is asked for.

    Returns:
        The weights, and the norm of the error of the profile over that of the profile.
    """
    exponents = np.array([exponent_of(s) for s in stds])
    steps, exponent, n = np.asarray(steps, dtype=np.float64), exponent_of(std), len(exponents)
    norm = products(step, exponent, step, exponent)
    gram = products(steps[:, None], exponents[:, None], steps, exponents) / norm
    target = products(steps, exponents, step, exponent) / norm
    system = np.block([[gram, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    weights = np.linalg.lstsq(system, np.append(target, 1.0), rcond=1e-12)[0][:n]
    error = 1 - 2 * target @ weights + weights @ gram @ weights
    return weights, max(0.0, error) ** 0.5


class ExponentialMovingAverage:
    """EMA of parameters; at update k = 1, 2, ... the decay is min(decay, rise(k))."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        decay: float,
        rise: Callable[[int], float] = lambda k: (1 + k) / (10 + k),
        is_here: Callable[[nn.Parameter], bool] = lambda parameter: True,
    ):
        """Start from a copy of the `parameters` that this process has; `decay` is in [0, 1].

        Other processes have the EMA weights of the other parameters; see `optimizers.shares`.
        """
        self.decay, self.rise, self.is_here = decay, rise, is_here
        self.num_updates = 0
        self.shadow_params = [
            p.detach().clone() if is_here(p) else torch.empty_like(p, device="meta")
            for p in parameters
        ]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], applied: Tensor) -> None:
        """Move the EMA weights towards `parameters`, in the order of construction.

        Where `applied`, a 0-d tensor on their device, is 0 and not 1, they stay as they are; the
        decay counts the update nevertheless, as the learning rate does.
        """
        self.num_updates += 1
        weight = 1 - min(self.decay, self.rise(self.num_updates))
        averages, parameters = self._here(parameters)
        if averages:
            torch._foreach_lerp_(averages, parameters, [weight * applied] * len(averages))

    @torch.no_grad()
    def restart(self, weights: Iterable[Tensor]) -> None:
        """Copy `weights`, in the order of construction."""
        averages, weights = self._here(weights)
        if averages:
            torch._foreach_copy_(averages, weights)

    def _here(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """EMA weights that this process has, and the `tensors` in the same positions.

        With more processes than parameters some have none: an empty list, which PyTorch refuses.
        """
        pairs = zip(self.shadow_params, tensors, strict=True)
        pairs = [(average, tensor) for average, tensor in pairs if not average.is_meta]
        return [average for average, _ in pairs], [tensor for _, tensor in pairs]

    @contextlib.contextmanager
    def swapped_into(
        self, parameters: Iterable[nn.Parameter], averages: list[Tensor] | None = None
    ):
        """Put the EMA weights, or these `averages`, into `parameters` within the `with` block."""
        parameters = list(parameters)
        averages = self.shadow_params if averages is None else averages
        _swap(averages, parameters)
        try:
            yield
        finally:
            _swap(averages, parameters)

    def state_dict(self) -> dict:
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": self.shadow_params,
        }


def _swap(averages: list[Tensor], parameters: list[nn.Parameter]) -> None:
    for average, parameter in zip(averages, parameters, strict=True):
        average.data, parameter.data = parameter.data, average.data
