"""Table of metrics: their names, their better direction, their computation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metrics import classifier, distances, intervals
from metrics.distances import KERNEL_BLOCK, NEIGHBOURS, OURS, Backend, Gaussian, TooFew
from metrics.intervals import Interval
from metrics.reference import Reference

QUERIED = 5_000  # training images whose own nearest neighbours are looked for
CLASSIFIED = 5_000  # training images that a classifier is fitted to, whose time grows as the square


@dataclass
class Comparison:
    """Samples and data in one feature space, from which metrics are computed."""

    features: NDArray  # of the samples, (n, K), n > 0
    logits: NDArray | None  # of the samples, (n, L), where the space has any
    reference: Reference
    backend: Backend = OURS
    device: torch.device | str = "cpu"  # where distances to neighbours are computed
    labels: NDArray | None = None  # class labels that the samples were drawn for, (n,)
    reference_labels: NDArray | None = None  # class labels of the features of `reference`, (m,)

    @cached_property
    def precision_recall(self) -> tuple[float | None, float | None]:
        """Precision and recall; None for both where the data's features are missing."""
        real = self.reference.features
        if real is None:
            return None, None
        if len(real) <= NEIGHBOURS:
            raise TooFew(f"they need more than {NEIGHBOURS} training images, not {len(real)}")
        return distances.precision_recall(real, self.features, device=self.device)

    @cached_property
    def nearest(self) -> tuple[NDArray, NDArray] | None:
        """Each sample's distance to the nearest training image, (n,), and its row in `reference`.

        None where the reference does not say which images its features are of.
        """
        real = self.reference
        if real.features is None or real.index is None:
            return None
        reaches, rows = distances.nearest(self.features, real.features, 1, self.device)
        return reaches[:, 0], rows[:, 0]


@dataclass(frozen=True)
class Metric:
    """One number of a report, under the key that it has in `METRICS`.

    `compute` gives None where its input is missing, and raises `TooFew`; a metric without `compute`
    is computed over the split `eval.dataset`, not from samples. `of_data` computes it for training
    images in place of samples, for comparison; the report has it as {key}_data. With `halves`,
    {key}_data is the value from `compare_halves`.
    """

    label: str
    better: int  # -1: lower is better, 1: higher; 0: neither, and checkpoints are not compared
    note: str  # a few words below the number
    compute: Callable[[Comparison], float | None] | None = None
    of_data: Callable[[Comparison], float | None] | None = None
    names_space: bool = False  # whether the label is followed by the feature space
    labels: Mapping[str, str] = field(default_factory=dict)  # other names, by feature space
    halves: bool = False  # whether it is also computed for two halves of the data
    interval: Callable[[Comparison, float], Interval | None] | None = None

    def label_in(self, space: str) -> str:
        """The label where `space` is the feature space, "" where there is none."""
        if space in self.labels:
            return self.labels[space]
        return f"{self.label}, {space}" if self.names_space and space else self.label


def _frechet(c: Comparison) -> float:
    if c.reference.gaussian is None or len(c.features) < 2:
        raise TooFew("covariances need at least 2 training images and 2 samples")
    real = c.reference.features if c.reference.complete else None
    return c.backend.frechet_distance(c.features, c.reference.gaussian, real)


def _frechet_interval(c: Comparison, distance: float) -> Interval | None:
    return intervals.of_frechet(distance, c.features, c.reference.gaussian)


def _in_blocks(c: Comparison) -> tuple[NDArray, NDArray]:
    """Features of data and samples, so many that blocks of the kernel have two of each."""
    fewer = min(len(c.reference.features), len(c.features))
    if fewer < 2:
        raise TooFew("it needs at least 2 training images and 2 samples")
    two_in_every_block = KERNEL_BLOCK * (fewer // 2)
    return c.reference.features[:two_in_every_block], c.features[:two_in_every_block]


def _kernel(c: Comparison) -> float | None:
    return None if c.reference.features is None else c.backend.kernel_distance(*_in_blocks(c))


def _kernel_interval(c: Comparison, distance: float) -> Interval | None:
    return intervals.of_kernel(distance, *_in_blocks(c))


def _inception_score(c: Comparison) -> float | None:
    return None if c.logits is None else c.backend.inception_score(c.logits)


def _score_interval(c: Comparison, score: float) -> Interval | None:
    return intervals.of_inception_score(score, c.logits)


def _share_of_samples(c: Comparison, share: float) -> Interval:
    return intervals.of_share(share, len(c.features))


def _recall_interval(c: Comparison, recall: float) -> Interval:
    # one ball of a sample may hold many images of the data
    return intervals.of_share(recall, min(len(c.features), len(c.reference.features)))


def _nearest(c: Comparison) -> float | None:
    return c.nearest and np.median(c.nearest[0])


def _nearest_of_data(c: Comparison) -> float | None:
    real = c.reference.features
    if c.nearest and len(real) < 2:
        raise TooFew("it needs at least 2 training images")
    return c.nearest and np.median(distances.nearest(real[:QUERIED], real, 2, c.device)[0][:, 1])


def _classified(c: Comparison) -> tuple[NDArray, NDArray] | None:
    """Features of training images and their labels, to fit a classifier to."""
    if c.labels is None or c.reference_labels is None:
        return None
    return c.reference.features[:CLASSIFIED], c.reference_labels[:CLASSIFIED]


def _agreement(c: Comparison) -> float | None:
    training = _classified(c)
    return training and classifier.accuracy(*training, c.features, c.labels)


def _agreement_of_data(c: Comparison) -> float | None:
    if (training := _classified(c)) is None:
        return None
    real, labels = training
    half = len(real) // 2
    return classifier.accuracy(real[:half], labels[:half], real[half:], labels[half:])


_FID = {"inception": "FID", "torchscript": "FID"}
_PRECISION = "share of samples on the data's manifold"
_RECALL = "share of the data on the samples' manifold"
_KID = "KID: unbiased, so below zero by chance where it is small"
_AGREEMENT = "share of samples that a classifier of the training images gives their label"
_ACCURACY = "share of images whose most probable label, by the likelihoods, is their own"
_NEAREST = "median distance of a training image to its nearest other one"

# Key in report_{k}.npz -> the metric, in the order in which they are shown.
METRICS: dict[str, Metric] = {
    "fid": Metric(
        "Fréchet distance",
        -1,
        "of Gaussian fits to the features",
        _frechet,
        names_space=True,
        labels=_FID,
        halves=True,
        interval=_frechet_interval,
    ),
    "kid": Metric(
        "Kernel distance",
        -1,
        _KID,
        _kernel,
        names_space=True,
        halves=True,
        interval=_kernel_interval,
    ),
    "IS": Metric(
        "Inception Score",
        1,
        "over all samples, without splits",
        _inception_score,
        interval=_score_interval,
    ),
    "precision": Metric(
        "Precision",
        1,
        _PRECISION,
        lambda c: c.precision_recall[0],
        halves=True,
        interval=_share_of_samples,
    ),
    "recall": Metric(
        "Recall",
        1,
        _RECALL,
        lambda c: c.precision_recall[1],
        halves=True,
        interval=_recall_interval,
    ),
    "agreement": Metric(
        "Agreement with the labels",
        1,
        _AGREEMENT,
        _agreement,
        _agreement_of_data,
        interval=_share_of_samples,
    ),
    "bpd": Metric("Bits/dim", -1, "negative log-likelihood"),
    "nats": Metric("Nats per entry", -1, "negative log-likelihood in the data's own units"),
    "loss": Metric("Loss", -1, "over the evaluated split"),
    "accuracy": Metric("Accuracy of p(label | image)", 1, _ACCURACY),
    "nearest": Metric(
        "Nearest training image",
        0,
        _NEAREST,
        _nearest,
        _nearest_of_data,
        interval=lambda c, median: intervals.of_median(c.nearest[0]),
    ),
}


def compare(comparison: Comparison) -> dict[str, float | str]:
    """The metrics of `METRICS` that can be computed, by their keys.

    An entry {key}_remark names those that too few images prevent, or says why the number under
    `key` is not one to quote; see `remarks`.
    """
    values, prevented = {}, {}
    for key, metric in METRICS.items():
        for name, compute in ((key, metric.compute), (f"{key}_data", metric.of_data)):
            try:
                if compute is not None and (value := compute(comparison)) is not None:
                    values[name] = value
            except TooFew as error:
                label = metric.label + (" of the data" if name != key else "")
                prevented.setdefault(str(error), {})[name] = label
        if metric.interval and key in values and (ends := metric.interval(comparison, values[key])):
            values |= zip((f"{key}_low", f"{key}_high"), ends, strict=True)
    for reason, labels in prevented.items():
        values[f"{min(labels)}_remark"] = f"left out: {', '.join(labels.values())}: {reason}"
    if "fid" in values and (words := distances.shortage(*comparison.features.shape)):
        values["fid_remark"] = f"{len(comparison.features):,} samples are {words}"
    if "nearest_data" in values:
        values |= _memorised(values["nearest"], values["nearest_data"])
    return values


def _memorised(nearest: float, nearest_data: float) -> dict[str, str]:
    """The remark where samples lie nearer to training images than these to each other."""
    if nearest > 0 and nearest >= nearest_data:
        return {}
    if nearest == 0:
        return {"nearest_remark": "half of the samples or more equal a training image: copies"}
    return {
        "nearest_remark": "samples lie nearer to training images than training images do to each "
        f"other: the median distances are {nearest:.4g} and {nearest_data:.4g}. Copies do "
        "(memorisation), and smooth images a little: look at the nearest training images"
    }


class Entry(NamedTuple):
    """A metric in reports: its `key`, "fid", or in a further feature space "torchscript:fid".

    `space` is the feature space; "" where it has none, or where reports have different ones. `name`
    stands in sentences, `label` in tables.
    """

    key: str
    metric: Metric
    space: str
    name: str
    label: str


def entries(*reports: Mapping) -> Iterator[Entry]:
    """Metrics that any of the reports (arrays of report_{k}.npz) has, in the order of a table."""
    kinds = [str(report["features"]).split(",") for report in reports if "features" in report]
    firsts, further = {first for first, *_ in kinds}, [kind for _, *rest in kinds for kind in rest]
    spaces = {"": firsts.pop() if len(firsts) == 1 else ""} | {f"{kind}:": kind for kind in further}
    for metric_key, metric in METRICS.items():
        for prefix, space in spaces.items():
            key, space = prefix + metric_key, space if metric.compute else ""
            if not any(key in report for report in reports):
                continue
            name, label = metric.label, metric.label_in(space)
            if further and space:  # another row may have the same name
                name = label = label if label.endswith(f", {space}") else f"{label}, {space}"
            yield Entry(key, metric, space, name, label)


def split_key(key: str) -> tuple[str, str]:
    """(feature space, key in `METRICS`) of a report's key; "" for its first space, or none."""
    space, _, metric = key.rpartition(":")
    return space, metric


def remarks(report: Mapping, apart: bool = False) -> list[str]:
    """Remarks of a report on missing or conspicuous numbers: its entries {key}_remark.

    With `apart`, only those on none of the `entries`, beside which the others stand.
    """
    beside = {f"{entry.key}_remark" for entry in entries(report)} if apart else ()
    keys = [key for key in report if key.endswith("_remark") and key not in beside]
    texts = [(split_key(key)[0], str(report[key])) for key in keys]
    return [f"{space}: {text}" if space else text for space, text in texts]


def remark_on(report: Mapping, key: str) -> str:
    """The remark on the number that `report` has under `key`; "" without either."""
    return str(report.get(f"{key}_remark", "")) if key in report else ""


def interval_of(report: Mapping, key: str) -> Interval | None:
    """The 95 % interval of the number that `report` has under `key`; None without one."""
    ends = (report.get(f"{key}_low"), report.get(f"{key}_high"))
    return None if None in ends else (float(ends[0]), float(ends[1]))


def over_sets(sets: Sequence[Mapping[str, float | str]]) -> dict[str, float | str]:
    """Entries of `compare` over several sets of samples, from the entries of each.

    Metrics are means, with the least and the largest value as {key}_min and {key}_max in place of
    an interval. All else is that of the first set.
    """
    first, *further = sets
    if not further:
        return dict(first)
    report = {key: value for key, value in first.items() if not key.endswith(("_low", "_high"))}
    for key in METRICS.keys() & first.keys():
        values = [float(each[key]) for each in sets if key in each]
        report |= {
            key: float(np.mean(values)),
            f"{key}_min": min(values),
            f"{key}_max": max(values),
        }
    return report


def range_of(report: Mapping, key: str) -> Interval | None:
    """The least and the largest value of the sets of samples of a report; None of one set."""
    ends = (report.get(f"{key}_min"), report.get(f"{key}_max"))
    return None if None in ends else (float(ends[0]), float(ends[1]))


# Entries that `compare_halves` gives.
OF_HALVES = (*(f"{key}_data" for key, m in METRICS.items() if m.halves), "half_first", "half_other")


def compare_halves(c: Comparison) -> dict[str, float]:
    """Metrics of a perfect model: one half of the training images compared with the other.

    A random half of the reference features, at most as many as there are samples, takes the place
    of the samples, and the other half that of the data; `TooFew` unless each has more than
    `NEIGHBOURS`. `half_first` and `half_other` are the numbers of images compared.
    """
    real = c.reference.features
    first, other = np.array_split(np.random.default_rng(0).permutation(real), 2)
    first = first[: len(c.features)]
    if len(first) <= NEIGHBOURS or len(other) <= NEIGHBOURS:
        needed = f"{2 * NEIGHBOURS + 2} training images and {NEIGHBOURS + 1} samples"
        raise TooFew(f"it needs {needed}, not {len(real)} and {len(c.features)}")
    reference = Reference(Gaussian.fit(other), other, complete=True)
    halves = Comparison(first, None, reference, c.backend, c.device)
    values = {f"{key}_data": m.compute(halves) for key, m in METRICS.items() if m.halves}
    return values | {"half_first": len(first), "half_other": len(other)}
