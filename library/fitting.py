"""Schedules and solver steps fitted to a network, and kept beside its checkpoint."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import distributed
from reports.progress import solver_bar
from samplers.ode import ODESampler
from solvers import FITTED, Schedule, fitted
from solvers.base import Callback, Step
from solvers.fitted import FINE_STEPS, Fit
from solvers.fixed_steps import Advance, Churn
from solvers.solve import solver_levels
from sources.batch import Conditions
from sources.keyed import keyed_generator
from storage.digests import digests
from storage.files import Spec, cached
from storage.run_checkpoints import fitted_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitting:
    """Fit of a sampler to the weights of a network.

    Measured errors and fitted steps are cached in files beside the checkpoint, valid for these
    weights and this ODE. The errors serve every number of steps; fitted steps have a file for each.

    Attributes:
        sampler: one with a schedule or solver to be fitted.
        network: its weights are those of `checkpoint`.
        device: of the network.
        checkpoint: the files lie beside it.
        origin: everything that the fit depends on; see `Experiment.origin`.
        seed: of the prior draws.
        draw_conditions: conditions to sample with; see `experiment.Experiment`.
    """

    sampler: ODESampler
    network: nn.Module
    device: torch.device
    checkpoint: Path
    origin: dict
    seed: int
    draw_conditions: Callable[..., Conditions]

    def fitted(self) -> ODESampler:
        """The sampler with its fitted schedule and, for the solver 'fitted', steps.

        Raises:
            FloatingPointError: a trajectory is not finite.
        """
        schedule = self._schedule()
        steps = self._steps(schedule) if self.sampler.solver == FITTED else None
        return replace(self.sampler, fit=Fit(schedule, steps))

    @property
    def _dim(self) -> int:
        return math.prod(self.sampler.codec.shape)

    def _schedule(self) -> Schedule:
        fine = for_trajectories(self.sampler)
        number = fitted.number_of_trajectories(self._dim, fitted.MOST_FOR_LEVELS)
        conditions = self.draw_conditions(number, "fitted")

        def compute() -> dict:
            parts = self._trajectories(fine, number, conditions)
            return {"relative_errors": sum(map(fitted.euler_errors, parts)).numpy()}

        k = fitted.FINE_STEPS + 1
        key, path = self._key(fine, number, conditions), fitted_path(self.checkpoint)
        spec = {"relative_errors": ("f", (k, k))}
        cost = fitted.step_costs(*cached_arrays(path, key, compute, spec))
        levels = fitted.fine_levels(self.sampler.method, k, self.sampler.rho)[:k]
        return partial(fitted.schedule, levels, cost)

    def _steps(self, schedule: Schedule) -> Advance:
        fine, taken = for_trajectories(self.sampler), for_fitting(self.sampler)
        n, order = taken.n, taken.order
        levels = solver_levels(taken.method, schedule, n, taken.rho, taken.noise_removal)
        number = fitted.number_of_trajectories(self._dim, fitted.MOST_FOR_STEPS)
        conditions = self.draw_conditions(number, "fitted")

        def compute() -> dict:
            parts = [
                fitted.states_at(levels[1:], steps)
                for steps in self._trajectories(fine, number, conditions)
            ]
            steps = fitted.Fitting([torch.cat(states) for states in zip(*parts, strict=True)])
            self._follow(taken, self._prior(number), conditions, Fit(schedule, steps))
            weights = [nn.functional.pad(w, (0, 1 + order - len(w))) for w in steps.weights]
            offsets = torch.stack(steps.offsets).cpu()
            return {"weights": torch.stack(weights).numpy(), "offsets": offsets.numpy()}

        key = self._key(taken, number, conditions)
        key |= {"levels": levels.tolist(), "trajectory sampler": fine.settings}
        path = fitted_path(self.checkpoint, n)
        spec = {"weights": ("f", (n, 1 + order)), "offsets": ("f", (n, *taken.codec.shape))}
        weights, offsets = cached_arrays(path, key, compute, spec)
        return fitted.stored_steps(levels, weights, offsets.to(self.device))

    def _key(self, sampler: ODESampler, number: int, conditions: Conditions) -> dict:
        key = self.origin | {"sampling": sampler.settings, "trajectories": number}
        return key | digests(**conditions)

    def _prior(self, number: int) -> Tensor:
        generator = keyed_generator(self.device, "fitted", self.seed)
        shape = (number, *self.sampler.codec.shape)
        return self.sampler.method.prior_sampling(shape, generator, self.device)

    def _trajectories(
        self, sampler: ODESampler, number: int, conditions: Conditions
    ) -> Iterator[list[Step]]:
        """Trajectories of `number` samples in fine steps, as many at a time as fit in memory."""
        log.info(f"fitting the sampler: solving {number} trajectories in fine steps")
        parts = math.ceil(number / fitted.at_once(self._dim))
        # In even parts: a part of one trajectory would have no distances between samples.
        rows = torch.arange(number, device=self.device).tensor_split(parts)
        for prior, part in zip(self._prior(number).tensor_split(parts), rows, strict=True):
            steps: list[Step] = []
            each = conditions.map(lambda condition, part=part: condition[part])
            self._follow(sampler, prior, each, Fit(fitted.fine_levels), steps.append)
            yield steps

    def _follow(
        self,
        sampler: ODESampler,
        x: Tensor,
        conditions: Conditions,
        fit: Fit,
        callback: Callback | None = None,
    ) -> None:
        with solver_bar(sampler.method) as watch:
            try:
                replace(sampler, fit=fit)(
                    self.network, x=x, conditions=conditions, callback=callback, watch=watch
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"fitting the sampler: {error}") from error


def for_trajectories(sampler: ODESampler) -> ODESampler:
    """The sampler of the trajectories to which schedule and solver are fitted.

    Its schedule has to be set to `solvers.fitted.fine_levels`. With it, for Gaussian data, the
    relative error of the samples is 2e-4 with `unipc` and 2e-3 with `multistep`.
    """
    return replace(
        sampler,
        solver="unipc",
        n=FINE_STEPS + 1,
        order=None,
        churn=Churn(0.0),
        schedule="auto",
        noise_removal=False,
        precision="fp32",
        fit=None,
    )


def for_fitting(sampler: ODESampler) -> ODESampler:
    """The sampler for fitted steps, which the caller has to add."""
    return replace(
        sampler,
        solver=FITTED,
        churn=Churn(0.0),
        schedule="auto",
        precision="fp32",
        order=min(sampler.order or 3, sampler.n),
        fit=None,
    )


def cached_arrays(path: Path, key: dict, compute: Callable[[], dict], spec: Spec) -> list[Tensor]:
    """The arrays of `spec`, from `path` or computed by the main process.

    Where they cannot be kept there, every process computes them.
    """
    if not distributed.is_main():
        distributed.barrier()
    arrays = cached(path, key, compute, spec=spec, optional=True)
    if distributed.is_main():
        distributed.barrier()
    return [torch.from_numpy(arrays[name]) for name in spec]
