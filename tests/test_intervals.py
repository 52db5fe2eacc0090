"""95 % intervals of the metrics: derivatives, closed forms, and how often they hold the mean."""

import math
import re
from functools import partial

import numpy as np
import pytest
from scipy.stats import binomtest
from test_compare import report, run
from test_report import made_by, page_of

from metrics import intervals
from metrics.distances import (
    Gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from metrics.reference import Reference
from metrics.table import METRICS, Comparison, compare, interval_of
from reports.compare import compare_page
from reports.page import INTERVALS
from reports.report_file import read_report
from reports.table import report_table
from storage.files import save_npz


def weighted_influences(value, n, step=1e-5):
    """Derivatives of `value(weights)` by each of n weights, at equal ones, their sum kept 1."""
    equal = np.full(n, 1 / n)
    moved = [value((1 - step) * equal + step * np.eye(n)[i]) for i in range(n)]
    return (np.array(moved) - value(equal)) / step


def half_width(interval):
    return (interval[1] - interval[0]) / 2


def test_frechet_interval_is_that_of_numerical_derivatives():
    random = np.random.default_rng(0)
    fake = random.standard_normal((60, 3)) @ random.standard_normal((3, 3)) + 0.5
    factor = random.standard_normal((3, 3))
    real = Gaussian(random.standard_normal(3), factor @ factor.T)

    def distance(weights):
        mean = weights @ fake
        return frechet_distance(Gaussian(mean, (fake - mean).T * weights @ (fake - mean)), real)

    influences = weighted_influences(distance, len(fake))
    expected = intervals.Z * influences.std(ddof=1) / math.sqrt(60)
    interval = intervals.of_frechet(10.0, fake, real)
    assert half_width(interval) == pytest.approx(expected, rel=0.02)  # n - 1 of the covariance
    assert np.mean(interval) == pytest.approx(10)
    assert intervals.of_frechet(10.0, fake[:3], real) is None


def test_frechet_interval_of_samples_or_data_without_variance():
    """The interval is finite, and has width 0 for a collapsed generator."""
    random = np.random.default_rng(7)
    fake, real = random.standard_normal((2, 60, 4))
    fake[:, 1] = real[:, 1] = real[:, 2] = 0.5
    both = half_width(intervals.of_frechet(1e3, fake, Gaussian.fit(real)))
    without = [np.delete(each, 1, 1) for each in (fake, real)]
    expected = half_width(intervals.of_frechet(1e3, without[0], Gaussian.fit(without[1])))
    assert both == pytest.approx(expected, rel=1e-3)
    assert intervals.of_frechet(9.0, np.ones((60, 4)), Gaussian.fit(real)) == (9, 9)


def test_inception_score_interval_is_that_of_numerical_derivatives():
    random = np.random.default_rng(1)
    p = random.dirichlet(np.ones(4), 50)

    def score(weights):
        return np.exp(weights @ (p * np.log(p / (weights @ p))).sum(1))

    influences = weighted_influences(score, 50)
    interval = intervals.of_inception_score(inception_score(np.log(p)), np.log(p))
    expected = intervals.Z * influences.std(ddof=1) / math.sqrt(50)
    assert half_width(interval) == pytest.approx(expected, rel=1e-3)


def test_kernel_interval_is_that_of_leaving_samples_out():
    """The jackknife, which leaves out each sample once."""
    random = np.random.default_rng(2)
    real, fake = random.standard_normal((80, 4)), 0.5 + random.standard_normal((80, 4))
    without = [kernel_distance(real, np.delete(fake, i, 0)) for i in range(80)]
    expected = intervals.Z * math.sqrt(79 * np.var(without))
    interval = intervals.of_kernel(kernel_distance(real, fake), real, fake)
    assert half_width(interval) == pytest.approx(expected, rel=0.02)


def test_kernel_interval_of_several_blocks_is_that_of_their_mean(monkeypatch):
    random = np.random.default_rng(3)
    real, fake = random.standard_normal((90, 4)), 0.5 + random.standard_normal((90, 4))
    parts = zip(np.split(real[::-1], 3), np.split(fake[::-1], 3), strict=True)
    variances = [half_width(intervals.of_kernel(0.0, x, y)) ** 2 for x, y in parts]
    monkeypatch.setattr(intervals, "KERNEL_BLOCK", 30)
    expected = math.sqrt(sum(variances)) / 3
    assert half_width(intervals.of_kernel(0.0, real, fake)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("k, n", [(0, 20), (7, 20), (20, 20), (3, 1000)])
def test_interval_of_a_share_is_wilsons(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert intervals.of_share(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_interval_of_a_median_holds_it():
    random = np.random.default_rng(4)
    inside = [
        low <= 0 <= high
        for low, high in (intervals.of_median(random.standard_normal(101)) for _ in range(400))
    ]
    assert 0.92 < np.mean(inside) < 0.98
    assert intervals.of_median(np.array([3.0])) == (3, 3)


def frechet(fake, data):
    real = data.gaussian
    distance = frechet_distance(Gaussian.fit(fake), real)
    return distance, intervals.of_frechet(distance, fake, real)


def kernel(fake, data):
    distance = kernel_distance(data.features[:200], fake)
    return distance, intervals.of_kernel(distance, data.features[:200], fake)


def share(key, fake, data):
    metric, comparison = METRICS[key], Comparison(fake, None, data)
    return (value := metric.compute(comparison)), metric.interval(comparison, value)


# The Frechet distance of samples of the data's own law has its smallest possible value in all of
# them, so that its first derivative is 0 but for noise: there the interval is too wide.
@pytest.mark.parametrize(
    "measure, shift, scale, low, high",
    [
        (frechet, 0.0, 1.0, 0.96, 1.0),
        (frechet, 0.7, 1.0, 0.91, 0.99),
        (frechet, 0.0, 0.8, 0.91, 0.99),
        (kernel, 0.0, 1.0, 0.91, 1.0),
        (kernel, 0.7, 1.0, 0.91, 0.99),
        (partial(share, "precision"), 0.7, 0.8, 0.91, 1.0),
        (partial(share, "recall"), 0.0, 0.7, 0.85, 1.0),
    ],
)
def test_intervals_hold_the_mean_of_evaluations(measure, shift, scale, low, high):
    """Evaluations have 200 samples of 8 features and the same data; the share should be 95 %."""
    random = np.random.default_rng(5)
    number = 1000 if measure in (frechet, kernel) else 400
    data = Reference.measure([random.standard_normal((number, 8))], number, number)
    results = [
        measure(shift / math.sqrt(8) + scale * random.standard_normal((200, 8)), data)
        for _ in range(200)
    ]
    mean = np.mean([value for value, _ in results])
    coverage = np.mean([ends[0] <= mean <= ends[1] for _, ends in results])
    assert low <= coverage <= high


def test_intervals_are_shown_wherever_there_are_metrics(tmp_path):
    """Console, page and comparison show them; there the range over seeds takes their place."""
    numbers = {"fid": 1.25, "fid_low": 1.125, "fid_high": 1.5, "seconds": 1.0, "step": 10}
    first = report(1, numbers)
    assert re.search(r"\n    95 % interval +1.125 to 1.5\n", report_table(first, "test", "title"))
    whole = {"nfe": 9.0, "sampling_seconds": 1.0, "settings": made_by(step=10)}
    page = page_of({1: first | whole})
    assert "<p>1.250</p><span>95 %: 1.125 to 1.500</span><span>of" in page and INTERVALS in page
    save_npz(tmp_path / "report_1.npz", **first | whole)
    assert interval_of(read_report(tmp_path / "report_1.npz"), "fid") == (1.125, 1.5)
    page = compare_page([run("a", first), run("b", report(2, {"fid": 2.0}), optim__lr=0.5)])
    assert "1.250\n[1.125, 1.500]</td><td>2</td>" in page and "In square brackets" in page
    page = compare_page([run("a", first, seed=1), run("b", report(2, {"fid": 2.0}), seed=2)])
    assert "(1.250 to 2)" in page and "[1.125" not in page


def test_every_metric_of_samples_has_an_interval():
    random = np.random.default_rng(6)
    real, fake = random.standard_normal((2, 60, 5))
    data = Reference.measure([real], 60, 60)
    labels = np.arange(60) % 3
    values = compare(
        Comparison(fake, fake, data, labels=labels, reference_labels=labels[data.index])
    )
    keys = {key for key, metric in METRICS.items() if metric.compute}
    assert keys <= values.keys()
    for key in keys:
        assert values[f"{key}_low"] <= values[key] <= values[f"{key}_high"], key
