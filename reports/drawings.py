"""Pictures of samples that an evaluation draws for the eye: along arcs, by class, by norm."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reports.images import save_grid, to_uint8
from reports.progress import solver_bar
from sampling import spherical_interpolation
from sources.batch import Conditions
from sources.keyed import keyed_generator

if TYPE_CHECKING:
    from experiment import Experiment

log = logging.getLogger(__name__)

ROWS, COLUMNS = 8, 10  # of the pictures of interpolation and rescaling
CLASS_ROWS = 10  # classes that a picture shows


def draw_interpolation(run: "Experiment", seed: int, path: Path) -> None:
    """Draw rows of one class each, along the arc from one prior sample to another."""
    shape = 2 * ROWS, *run.codec.shape
    generator = keyed_generator(run.device, "interpolation", seed)
    ends = run.method.prior_sampling(shape, generator, run.device)
    shares = torch.linspace(0, 1, COLUMNS, device=run.device)
    x = spherical_interpolation(*ends.chunk(2), shares).flatten(0, 1)
    _draw_strips(run, x, path, generator)


def draw_classes(run: "Experiment", seed: int, path: Path) -> None:
    """Draw a row for each class, at most `CLASS_ROWS`; a column has one prior sample.

    Without classes, or where `sampling.class_label` is set, there is no picture.
    """
    if not run.classes or run.sampler.class_label >= 0:
        return
    rows, shape = min(run.classes, CLASS_ROWS), run.codec.shape
    generator = keyed_generator(run.device, "classes", seed)
    x = run.method.prior_sampling((COLUMNS, *shape), generator, run.device).repeat(rows, 1, 1, 1)
    conditions = Conditions()
    if run.data.condition_names:  # the others are the same in every row
        conditions = run.draw_conditions(1, "classes").map(
            lambda row: row.repeat_interleave(rows, 0)
        )
    labels = {"class_labels": torch.arange(rows, device=run.device)}
    _draw_strips(run, x, path, generator, conditions | labels)


def draw_rescaling(
    run: "Experiment", seed: int, path: Path, norms: tuple[float, float] | None = None
) -> None:
    """Draw rows of one prior sample each, whose norm (the temperature) rises from left to right.

    The norms lie between the two `norms`, by default the method's own.
    """
    shape = run.codec.shape
    generator = keyed_generator(run.device, "rescaling", seed)
    x = run.method.prior_sampling((ROWS, *shape), generator, run.device)
    low, high = norms or run.method.prior_norms(math.prod(shape))
    lengths = torch.linspace(low, high, COLUMNS, device=run.device)
    direction = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = (direction[:, None] * lengths.view(1, -1, 1, 1, 1)).flatten(0, 1)
    _draw_strips(run, x, path, generator)


def _draw_strips(
    run: "Experiment",
    x: Tensor,
    path: Path,
    generator: torch.Generator,
    conditions: Conditions | None = None,
) -> None:
    """Draw rows of `COLUMNS` samples from `x`; row i has conditions i, random ones if None."""
    if conditions is None:
        conditions = run.draw_conditions(len(x) // COLUMNS, "rows")
    conditions = conditions.map(lambda rows: rows.repeat_interleave(COLUMNS, 0))
    try:
        with solver_bar(run.method) as watch:
            samples, _ = run.sampler(
                run.network, x=x, generator=generator, conditions=conditions, watch=watch
            )
    except FloatingPointError as error:
        log.warning(f"{path} is not drawn: {error}")
    else:
        save_grid(path, to_uint8(samples), COLUMNS)
