"""Pictures of samples that an evaluation draws for the eye: along arcs, by class, by norm."""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from experiment_parts import Parts
from reports.images import CLASS_ROWS, save_grid
from reports.progress import solver_bar
from sampling import spherical_interpolation
from sources.batch import Conditions
from sources.keyed import keyed_generator

log = logging.getLogger(__name__)

ROWS, COLUMNS = 8, 10  # of the pictures of interpolation and rescaling


def draw_interpolation(experiment: Parts, seed: int, path: Path) -> None:
    """Draw rows of one class each, along the arc from one prior sample to another."""
    generator = keyed_generator(experiment.device, "interpolation", seed)
    ends = _prior_samples(experiment, 2 * ROWS, generator)
    shares = torch.linspace(0, 1, COLUMNS, device=experiment.device)
    x = spherical_interpolation(*ends.chunk(2), shares).flatten(0, 1)
    _draw_strips(experiment, x, path, generator, experiment.draw_conditions(ROWS, "rows"))


def draw_classes(experiment: Parts, seed: int, path: Path) -> None:
    """Draw a row for each class, at most `CLASS_ROWS`; a column has one prior sample.

    Without classes, or where `sampling.class_label` is set, there is no picture.
    """
    if not experiment.classes or experiment.sampler.class_label >= 0:
        return
    rows = min(experiment.classes, CLASS_ROWS)
    generator = keyed_generator(experiment.device, "classes", seed)
    x = _prior_samples(experiment, COLUMNS, generator).repeat(rows, 1, 1, 1)
    conditions = Conditions()
    # other conditions than labels are the same in every row
    if experiment.data.condition_names or experiment.condition_codec:
        conditions = experiment.draw_conditions(1, "classes")
        conditions = conditions.map(lambda row: row.repeat_interleave(rows, 0))
    labels = {"class_labels": torch.arange(rows, device=experiment.device)}
    _draw_strips(experiment, x, path, generator, conditions | labels)


def draw_rescaling(
    experiment: Parts, seed: int, path: Path, norms: tuple[float, float] | None = None
) -> None:
    """Draw rows of one prior sample each, whose norm (the temperature) rises from left to right.

    The norms lie between the two `norms`, by default the method's own.
    """
    generator = keyed_generator(experiment.device, "rescaling", seed)
    x = _prior_samples(experiment, ROWS, generator)
    low, high = norms or experiment.method.prior_norms(math.prod(x.shape[1:]))
    lengths = torch.linspace(low, high, COLUMNS, device=experiment.device)
    direction = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = (direction[:, None] * lengths.view(1, -1, 1, 1, 1)).flatten(0, 1)
    _draw_strips(experiment, x, path, generator, experiment.draw_conditions(ROWS, "rows"))


def _prior_samples(experiment: Parts, number: int, generator: torch.Generator) -> Tensor:
    shape = number, *experiment.codec.shape
    return experiment.method.prior_sampling(shape, generator, experiment.device)


def _draw_strips(
    experiment: Parts,
    x: Tensor,
    path: Path,
    generator: torch.Generator,
    conditions: Conditions,
) -> None:
    """Draw rows of `COLUMNS` samples from `x`; row i has conditions i."""
    conditions = conditions.map(lambda rows: rows.repeat_interleave(COLUMNS, 0))
    sampler, network = experiment.sampler, experiment.network
    try:
        with solver_bar(experiment.method) as watch:
            samples, _ = sampler(
                network, x=x, generator=generator, conditions=conditions, watch=watch
            )
    except FloatingPointError as error:
        log.warning(f"{path} is not drawn: {error}")
    else:
        codec = experiment.codec
        save_grid(path, codec.pictures(codec.stored(samples)), COLUMNS)
