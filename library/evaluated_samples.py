"""Samples of a checkpoint, drawn in rounds and compared with the data in feature spaces."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from datasets import DataSet
from library.evaluated import Evaluated
from library.rounds import Rounds, remove_others
from metrics.distances import TooFew
from metrics.features import FeatureSpace
from metrics.reference import ReferenceStatistics
from metrics.table import OF_HALVES, Comparison, compare, compare_halves, over_sets
from reports.images import (
    GRID_SAMPLES,
    by_class,
    channels_last,
    class_rows,
    image_grid,
    save_grid,
)
from reports.progress import solver_bar
from solvers.base import TooManyEvaluations
from storage.digests import digests_of_conditions
from storage.files import cached, check_arrays, read_arrays, save_png

log = logging.getLogger(__name__)

OF_CLASS = 10  # samples of a class in a row of the picture of samples
PAIRS = 10  # samples in a row of the picture of nearest training images


def compare_samples(
    evaluated: Evaluated, statistics: Sequence[ReferenceStatistics], number: int, repeats: int = 1
) -> dict:
    """Draw `number` samples and compare their features with those of the data, in each space.

    With `repeats`, that many independent sets are drawn. Metrics are then means over the sets, with
    minimum and maximum; see `metrics.table.over_sets`. Pictures and remarks are those of the first
    one.

    Returns the report's entries on samples (docs/architecture.md), in the main process only.
    """
    spaces = [each.space for each in statistics]
    sets = [_rounds(replace(evaluated, repeat=i), spaces, number) for i in range(repeats)]
    if not sets[0]:
        return {}
    finite = [sum(len(each["pool_3"]) for each in rounds) for rounds in sets]
    report = {
        "features": ",".join(space.label for space in spaces),
        "num_samples": min(finite),
        "nonfinite": number - min(finite),
        "sampling_seconds": sum(each["seconds"] for rounds in sets for each in rounds) / repeats,
        "sampling": json.dumps(evaluated.origin["sampling"], sort_keys=True),
        **({"repeats": repeats} if repeats > 1 else {}),
    }
    for count in finite:
        if count < number:
            log.warning(f"{number - count} of {number} samples are not finite and do not count")
    sets = [rounds for rounds, count in zip(sets, finite, strict=True) if count]
    if not sets:
        log.warning("no sample is finite: there is nothing to compare with the data")
        return report
    report["nfe"] = np.mean([x["nfe"] for rounds in sets for x in rounds if len(x["pool_3"])])
    log.info(f"comparing {' and '.join(f'{n:,}' for n in finite)} samples with the data")
    labels = [labels_of(rounds) if evaluated.experiment.classes else None for rounds in sets]
    for i, each in enumerate(statistics):
        comparisons = [
            _comparison(evaluated, each, *of_set, i) for of_set in zip(sets, labels, strict=True)
        ]
        entries = over_sets([*map(compare, comparisons)])
        entries |= _halves(evaluated, comparisons[0], each.space, i)
        prefix = "" if i == 0 else f"{each.space.label}:"
        report |= {f"{prefix}{key}": value for key, value in entries.items()}
        if i == 0:
            _draw(evaluated, comparisons[0], each.data, sets[0])
    return report


def draw_round(evaluated: Evaluated, r: int, number: int) -> dict:
    """Draw `number` samples; return the finite ones, as stored, with class labels if any.

    There are none where the solver diverges. Raises TooManyEvaluations where it stops at its
    limit, since with a larger one these samples could be finite.
    """
    experiment, key = evaluated.experiment, (r, *evaluated.of_set)
    generator = evaluated.generator("samples", *key)
    conditions = experiment.draw_conditions(number, "samples", *key)
    labels = conditions.get("class_labels")
    try:
        with solver_bar(experiment.method) as watch:
            samples, nfe = experiment.sampler(
                experiment.network, number, generator=generator, conditions=conditions, watch=watch
            )
    except TooManyEvaluations:
        raise
    except FloatingPointError as error:
        log.warning(f"round {r}: none of its {number} samples counts: {error}")
        samples, nfe = torch.empty(0, *experiment.codec.data_shape), 0
        labels = None if labels is None else labels[:0]
    finite = samples.flatten(1).isfinite().all(1)
    result = {"samples": experiment.codec.stored(samples[finite]), "nfe": nfe}
    return result if labels is None else result | {"labels": labels[finite].cpu().numpy()}


def draw_images(evaluated: Evaluated, number: int) -> None:
    """Save a picture of `number` samples at most, for the eye only."""
    parts = Rounds("", min(GRID_SAMPLES, number), evaluated.batch_size).parts
    rounds = [draw_round(evaluated, r, part.stop - part.start) for r, part in enumerate(parts)]
    samples = np.concatenate([each["samples"] for each in rounds])
    labels = None
    if evaluated.experiment.classes:
        labels = np.concatenate([each["labels"] for each in rounds])
    if len(samples):
        _save_first(evaluated, "ode_images", len(samples), labels, lambda rows: samples[rows])


def _rounds(evaluated: Evaluated, spaces: Sequence[FeatureSpace], number: int) -> list[dict]:
    """The samples in rounds of `batch_size`: `path`, `nfe`, `seconds`, `spaces`, `pool_3`.

    `spaces` are the features in each space, `pool_3` those in the first. A round has a file of
    samples, and a file of their features in each space; a kill costs one round at most.
    """
    experiment, folder = evaluated.experiment, evaluated.samples_folder
    rounds = Rounds("sampling", number, evaluated.batch_size)
    sample_paths = [folder / f"samples_{r}.npz" for r in range(len(rounds.parts))]
    suffixes = ["", *(f"_{space.label}" for space in spaces[1:])]
    feature_paths = [
        [folder / f"statistics{suffix}_{r}.npz" for suffix in suffixes]
        for r in range(len(rounds.parts))
    ]
    remove_others(folder, "*.npz", [*sample_paths, *sum(feature_paths, [])])
    names = ["samples", "nfe"] + ["labels"] * bool(experiment.classes)

    def compute(r: int, part: slice) -> dict:
        number = part.stop - part.start
        key = evaluated.origin | {"round": r, "number": number}
        key |= {"repeat": evaluated.repeat} if evaluated.repeat else {}
        conditions = experiment.draw_conditions(number, "samples", r, *evaluated.of_set)
        key |= digests_of_conditions(conditions)
        draw = partial(draw_round, evaluated, r, number)
        samples = cached(sample_paths[r], key, draw, names)
        images, features = samples["samples"], []
        for space, path in zip(spaces, feature_paths[r], strict=True):
            origin = key | {"features": space.name}
            work = partial(features_of, space, images)
            features.append(cached(path, origin, work, ("pool_3",)))
        cost = {"nfe": samples["nfe"], "seconds": samples["seconds"], "path": sample_paths[r]}
        return cost | {"pool_3": features[0]["pool_3"], "spaces": features}

    return rounds.results(compute)


def features_of(space: FeatureSpace, images: NDArray) -> dict:
    """The features of `images` as stored, (n, H, W, C), and logits where the space has any."""
    if not len(images):
        return {"pool_3": np.empty((0, space.width), np.float32)}
    pool_3, logits = space(images)
    return {"pool_3": pool_3} if logits is None else {"pool_3": pool_3, "logits": logits}


def _comparison(
    evaluated: Evaluated,
    statistics: ReferenceStatistics,
    rounds: list[dict],
    labels: np.ndarray | None,
    i: int,
) -> Comparison:
    """The samples and the data in feature space number `i`."""
    space, device = statistics.space, evaluated.experiment.device
    of_space = [each["spaces"][i] for each in rounds]
    logits = [features["logits"] for features in of_space if "logits" in features]
    return Comparison(
        np.concatenate([features["pool_3"] for features in of_space]),
        np.concatenate(logits) if logits else None,
        statistics.reference,
        space.backend,
        device if device.type == "cuda" else torch.device("cpu"),  # which has float64
        labels,
        statistics.labels,
    )


def _halves(evaluated: Evaluated, comparison: Comparison, space: FeatureSpace, i: int) -> dict:
    """The entries of `compare_halves`, cached in the folder: all checkpoints share them."""
    features = comparison.reference.features
    if features is None:
        return {}
    origin = {"data": hashlib.sha256(features.tobytes()).hexdigest()}
    origin |= {"samples": len(comparison.features), "entries": OF_HALVES}
    suffix = f"_{space.label}" if i else ""
    path = evaluated.folder / f"data_halves{suffix}.npz"
    try:
        results = cached(path, origin, partial(compare_halves, comparison), OF_HALVES)
    except TooFew as error:
        return {"half_first_remark": f"left out: data against data: {error}"}
    return {name: results[name] for name in OF_HALVES}


def _draw(
    evaluated: Evaluated, comparison: Comparison, data: DataSet | None, rounds: list[dict]
) -> None:
    """Save pictures of samples, of training images, and of samples beside their nearest."""
    number, labels = len(comparison.features), comparison.labels
    pictures = evaluated.experiment.codec.pictures
    _save_first(evaluated, "ode_images", number, labels, partial(samples_at, rounds))
    if data is None:
        return
    reference, labels = comparison.reference, comparison.reference_labels

    def training_images(rows: np.ndarray) -> NDArray:
        return channels_last(data[torch.from_numpy(reference.index[rows])])

    number = min(number, len(reference.index))
    _save_first(evaluated, "data_images", number, labels, training_images)
    # samples, and below each its nearest training image, to look for copies: first those
    # samples that are closest to the data, then the first ones drawn
    distances, rows = comparison.nearest
    number, strips = min(PAIRS, len(distances)), []
    for sample_rows in (distances.argsort()[:number], np.arange(number)):
        nearest = training_images(rows[sample_rows])
        pairs = np.concatenate([samples_at(rounds, sample_rows), nearest])
        strips.append(image_grid(pictures(pairs), columns=number))
    save_png(evaluated.picture("nearest"), np.concatenate(strips))


def _save_first(
    evaluated: Evaluated,
    name: str,
    number: int,
    labels: np.ndarray | None,
    images_at: Callable[[np.ndarray], NDArray],
) -> None:
    """Save a picture of the first of `number` images, sorted by their class `labels` (number,).

    Where there are `class_rows`, it has the first `OF_CLASS` images of each class in a row.
    `images_at` gives the images of row numbers, as stored.
    """
    experiment, path = evaluated.experiment, evaluated.picture(name)
    pictures = experiment.codec.pictures
    classes = class_rows(experiment.classes, experiment.sampler.class_label)
    if labels is not None and classes:
        of_class = [np.flatnonzero(labels == label)[:OF_CLASS] for label in range(classes)]
        rows = np.concatenate(of_class)
        images = by_class(pictures(images_at(rows)), labels[rows], classes, OF_CLASS)
        save_grid(path, images, OF_CLASS)
        return
    rows = np.arange(min(GRID_SAMPLES, number))
    if labels is not None:
        rows = rows[labels[rows].argsort(kind="stable")]
    save_grid(path, pictures(images_at(rows)))


def labels_of(rounds: list[dict]) -> np.ndarray:
    """The class labels that the samples of the rounds were drawn for, from their files."""
    return np.concatenate([_read_round(each, {"labels": "i"})["labels"] for each in rounds])


def samples_at(rounds: list[dict], rows: np.ndarray) -> NDArray:
    """The samples number `rows`, from the files of the rounds, each of which is read once."""
    ends = np.cumsum([len(each["pool_3"]) for each in rounds])
    round_of = np.searchsorted(ends, rows, side="right")
    images = {}
    for r in np.unique(round_of):
        samples = _read_round(rounds[r], {"samples": "uifb"})["samples"]
        images |= {row: samples[row - ends[r]] for row in rows[round_of == r]}
    return np.stack([images[row] for row in rows])


def _read_round(round_: dict, kinds: dict[str, str]) -> dict:
    """The arrays `kinds` of a round's file, with one row for each sample."""
    path, n = round_["path"], len(round_["pool_3"])
    rest = {"samples": (None, None, None)}
    spec = {name: (kind, (n, *rest.get(name, ()))) for name, kind in kinds.items()}
    return check_arrays(path, read_arrays(path), spec)
