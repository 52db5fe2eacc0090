"""Predictors and correctors of a score SDE (Song et al. 2021, arXiv 2011.13456).

Each takes one step at `x` (B, C, H, W) and time `t`, () or (B,), by the score there and standard
normal noise, both of the shape of `x`, and returns the new x with its noise and without.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from methods.base import noise_like, spread
from methods.restoration import Replacement
from methods.sde import SDE, reverse
from solvers.base import Callback, FiniteStates, Step


def euler_maruyama(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, probability_flow: bool = False
) -> tuple[Tensor, Tensor]:
    """Euler-Maruyama's step of length 1 / N of the reverse SDE, or of the probability flow."""
    drift, diffusion = reverse(*sde.sde(x, t), score, probability_flow)
    mean = x - drift / sde.N
    return mean + spread(diffusion, x) / math.sqrt(sde.N) * noise, mean


def reverse_diffusion(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, probability_flow: bool = False
) -> tuple[Tensor, Tensor]:
    """The step of the SDE's own discretisation, reversed (appendix E)."""
    drift, diffusion = reverse(*sde.discretize(x, t), score, probability_flow)
    mean = x - drift
    return mean + spread(diffusion, x) * noise, mean


def ancestral_sampling(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, probability_flow: bool = False
) -> tuple[Tensor, Tensor]:
    """The Markov chain's step back, drawn given the score (equation 4, appendix F)."""
    a, b = (spread(c, x) for c in sde.transition(t))
    mean = (x + b**2 * score) / a
    return mean + spread(sde.ancestral_std(t), x) * noise, mean


def langevin(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, snr: float
) -> tuple[Tensor, Tensor]:
    """A Langevin step, its size from the mean norms of noise and score (algorithms 4 and 5)."""
    a, _ = sde.transition(t)
    ratio = snr * noise.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
    return _langevin(x, score, noise, spread(a**2, x) * ratio**2)


def ald(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, snr: float
) -> tuple[Tensor, Tensor]:
    """A step of annealed Langevin dynamics, its size from the noise level (arXiv 1907.05600)."""
    a, _ = sde.transition(t)
    return _langevin(x, score, noise, spread((a * snr * sde.std(t)) ** 2, x))


def _langevin(x: Tensor, score: Tensor, noise: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    mean = x + 2 * size * score
    return mean + 2 * size.sqrt() * noise, mean


PREDICTORS = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": None,
}
CORRECTORS = {"langevin": langevin, "ald": ald, "none": None}


def predictor_corrector(
    sde: SDE,
    score: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    generator: torch.Generator | None = None,
    *,
    n_steps_each: int = 1,
    snr: float = 0.16,
    probability_flow: bool = False,
    noise_removal: bool = False,
    callback: Callback | None = None,
    constrain: Replacement | None = None,
    resample: int = 1,
) -> Tensor:
    """Integrate `x` (B, C, H, W) from the prior to the data in the SDE's N steps (algorithm 1).

    Args:
        sde: its reverse is integrated.
        score: (x (B, C, H, W), a time ()) -> the score there, of the shape of x.
        x: a sample of the prior.
        predictor, corrector: names in `sde.predictors` and `sde.correctors`.
        generator: source of the noise, on the device of `x`.
        n_steps_each: corrector steps before each step of the predictor.
        snr: ratio that sets the corrector's step size, > 0.
        probability_flow: the predictor follows the ODE.
        noise_removal: leave out the noise of the last step.
        callback: called before each of the N steps; its level is the time, its slope the score.
        constrain: applied after every step of predictor and corrector, at the time that the step
            leads to. Where it does not act at the end of a predictor's step, that step is taken
            once and without a corrector, since samples would drift away from the constraint.
        resample: times that each of the N steps is taken while `constrain` acts, with a step of the
            chain back to noise between them (RePaint, arXiv 2201.09865, algorithm 1).

    Raises:
        FloatingPointError: the sample is not finite; the message says since which time.
    """
    predict, correct = PREDICTORS[predictor], CORRECTORS[corrector]
    steps = [partial(correct, snr=snr)] * n_steps_each if correct else []
    steps += [partial(predict, probability_flow=probability_flow)] if predict else []
    times = torch.linspace(sde.t_prior, sde.t_data, sde.N, dtype=torch.float64)
    mean, states = x, FiniteStates()
    for i, t in enumerate(times):
        t_next = times[min(i + 1, sde.N - 1)]
        free = predict and constrain and not constrain.acts(t_next)
        for repeat in range(1 if free else resample):
            if repeat:
                a, b = (spread(c, x) for c in sde.transition(t))
                x = a * x + b * noise_like(x, generator)
            for k, step in enumerate(steps[-1:] if free else steps):
                slope = score(x, t)
                if callback and repeat == k == 0:
                    callback(Step(i, t.item(), x, slope))
                x, mean = step(sde, x, t, slope, noise_like(x, generator))
                if constrain:
                    x = constrain(generator, x, t_next if predict and step is steps[-1] else t)
        states.note(x, t)
    states.check()
    return mean if noise_removal else x
