"""Samples that follow the field lines from one data set to another.

Source: Kolesov et al. 2025 (arXiv 2502.02367).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs.keys import check_positive
from methods.base import Network, noise_like
from methods.field_matching import FieldMatching, start_radius
from samplers import base
from samplers.base import Sampler
from solvers.base import Callback, Step, Watch
from solvers.field_lines import Directions, follow, leave
from solvers.rk45 import limits_of


@dataclass(frozen=True, kw_only=True)
class FieldLineSampler(Sampler):
    """Sampler that follows the lines of a field from images of the prior to the data.

    Attributes:
        rtol, atol, max_evaluations: see `solvers.field_lines.follow`.
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    max_evaluations: int = 1000

    follows_ode = False
    follows_lines = True
    keys = base.KEYS
    options = Sampler.options | {
        name: f"sampling.{name}" for name in ("rtol", "atol", "max_evaluations")
    }

    @classmethod
    def words(cls, values):
        return "field lines", f"rtol {values.get('rtol')}, atol {values.get('atol')}"

    def check(self):
        if not self.method.follows_lines:
            raise ValueError(
                "sampling.method='field_lines' is for field matching (training.sde='efm'), not for "
                f"{self.method.name}"
            )
        for feature, part in (
            ("guidance", self.guidance),
            ("a restorer", self.measurement),
            ("sampling.init='condition'", self.start),
        ):
            if part is not None:
                self.method.check_ode(feature)
        check_positive(self, "rtol", "atol", "max_evaluations")

    @property
    def couples_samples(self) -> bool:
        return False

    @property
    def tells_times(self) -> bool:
        return False

    @property
    def integrate(self):
        return partial(sample_lines, **limits_of(self))


def sample_lines(
    method: FieldMatching,
    net: Network,
    x: Tensor,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
    watch: Watch | None = None,
    **limits: float,
) -> tuple[Tensor, int]:
    """Follow a line from each image `x` (B, C, H, W) of the prior.

    Args:
        method, net: these give the direction of the field; see `FieldMatching.direction`.
        generator: source of the sides and directions in which lines leave.
        callback: called for each step, after all lines have ended, with evenly falling levels.
        watch: see `solvers.base.Watch`; the level is the share of lines that have not ended.
        limits: of `solvers.field_lines.follow`.

    Returns:
        The images where lines end, nan for lines that are given up, and the number of network
        evaluations.
    """
    shape, states = x.shape[1:], []
    record = (lambda p: states.append(p[:, :-1].unflatten(1, shape))) if callback else None
    direction = partial(method.direction, net, shape=shape)
    plates = {"L": method.L, "z_min": method.z_min, "reach": method.reach}
    follows = {"generator": generator, "watch": watch, "record": record}
    ends, evaluations = carry(direction, x.flatten(1), **plates, **follows, **limits)
    for i, state in enumerate(states):
        callback(Step(i, 1 - i / len(states), state, torch.zeros_like(state)))
    return ends.unflatten(1, shape), evaluations


def carry(
    direction: Directions,
    x: Tensor,
    L: float,
    z_min: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """Follow a line of a field from each charge `x` (B, N) of the plate z = 0 to the plate z = L.

    Args:
        direction: of the field.
        L, z_min: see `FieldMatching`.
        generator: source of the sides and directions in which lines leave.
        options: of `solvers.field_lines.follow`.

    Returns:
        The ends (B, N), nan for lines that are given up, and the number of evaluations.
    """
    draws = noise_like(torch.nn.functional.pad(x, (0, 3)), generator)
    normal, luck = draws[:, :-2], torch.special.ndtr(draws[:, -2:])
    points = leave(direction, x, normal, luck[:, 0], start_radius(z_min, x.shape[1]))
    ends, evaluations = follow(direction, points, luck[:, 1], plate=L, margin=z_min, **options)
    return ends, evaluations + 2
