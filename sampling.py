"""Samplers by name, what a config's `sampling` names, and arcs between latents."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from configs.keys import named
from configs.schema import Key, OneOf
from losses import objective_named
from methods.base import Method, Network
from samplers.base import Guidance, Sampler
from samplers.consistency import ConsistencySampler
from samplers.field_lines import FieldLineSampler
from samplers.ode import ODESampler
from samplers.pc import PCSampler
from solvers import solver_named
from solvers.solve import encode, solve_ode
from sources.codec import Codec
from sources.codec import from_config as get_codec

__all__ = [
    "ConsistencySampler",
    "Guidance",
    "ODESampler",
    "PCSampler",
    "Sampler",
    "encode",
    "get_sampling_fn",
    "solve_ode",
]

SNAPSHOT_STEPS = 18  # as many as EDM's sampler takes: 35 evaluations of heun

# sampling.method -> the class of the sampler.
SAMPLERS: dict[str, type[Sampler]] = {
    "ode": ODESampler,
    "pc": PCSampler,
    "consistency": ConsistencySampler,
    "field_lines": FieldLineSampler,
}

KEYS = {
    "sampling.method": Key(
        "ode",
        OneOf(registry="sampling.SAMPLERS"),
        "the ODE or, for SDEs, 'pc': predictor and corrector; 'consistency': N evaluations of a "
        "network of training.objective='consistency'; 'field_lines': for field matching",
    ),
}


def get_sampling_fn(config, method: Method, guide: Network | None = None) -> Sampler:
    """The sampler of `config.sampling`, to be called as `Sampler.__call__` says.

    `guide` is the network of `sampling.guide`. Raises ValueError as `Sampler.from_config` does.
    """
    return from_config(config, method, get_codec(config), guide)


def from_config(config, method: Method, codec: Codec, guide: Network | None) -> Sampler:
    """The sampler of `config.sampling` between `method` and `codec`; see `get_sampling_fn`."""
    name = config.sampling.method
    kind = named(SAMPLERS, "sampling.method", name)
    objective = objective_named(config.training.objective)
    if kind.follows_lines:
        return kind.from_config(config, method, codec, guide)
    method.check_ode(f"sampling.method={name!r} (else 'field_lines')")
    if kind.follows_ode:
        objective.check_ode(f"sampling.method={name!r} (else 'consistency')")
    elif objective.predicts_mean:
        raise ValueError(
            f"sampling.method={name!r} is for a network of training.objective='consistency', not "
            f"{config.training.objective!r}"
        )
    return kind.from_config(config, method, codec, guide)


def for_snapshots(sampler: Sampler, solver: str) -> Sampler:
    """The sampler of the pictures that training draws, of few evaluations.

    `solver`, from `training.snapshot_solver`, replaces an adaptive one, which can take any number
    of steps with a network early in training. There is no fit, since the weights still change.
    """
    sampler = sampler.without_fit()
    if not isinstance(sampler, ODESampler) or solver_named(sampler.solver).schedule:
        return sampler
    return replace(sampler, solver=solver, n=SNAPSHOT_STEPS)


def spherical_interpolation(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Points on the arcs from `start` to `end`, each (n, C, H, W): (n, k, C, H, W).

    `shares` (k,) are shares of the arc's angle, from 0 at `start` to 1 at `end`; between vectors of
    one length all points have that length (Shoemake 1985).
    """
    a, b = start.flatten(1), end.flatten(1)
    angle = torch.nn.functional.cosine_similarity(a, b).clamp(-1, 1).acos()[:, None] / math.pi
    # sin(s angle) / sin(angle), without 0 / 0 between vectors of one direction
    weight_a = (1 - shares) * torch.sinc((1 - shares) * angle) / torch.sinc(angle)
    weight_b = shares * torch.sinc(shares * angle) / torch.sinc(angle)
    points = weight_a[..., None] * a[:, None] + weight_b[..., None] * b[:, None]
    return points.unflatten(2, start.shape[1:])
