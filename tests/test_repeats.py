"""eval.repeats: several independent sets of samples, their mean, minimum and maximum."""

import numpy as np
import pytest
from test_small_runs import report_of, tiny

import run_lib
from datasets import get_dataset
from library import evaluated_samples
from metrics.table import over_sets, range_of
from reports.compare import compare_page
from reports.report_file import read_report
from reports.runs import read_run
from reports.table import report_table

KEYS = ("fid", "kid", "precision", "recall", "nearest")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run evaluated with one set of samples and then with three, and the files of the first."""
    folder = tmp_path_factory.mktemp("repeats")
    config = tiny("pfgmpp/digits_ddpmpp.py", folder, eval__num_samples=24, eval__enable_loss=False)
    config.training.snapshot_sampling = False
    assert run_lib.train(config, folder)
    run_lib.evaluate(config, folder)
    single = report_of(folder, 2)
    files = {path: path.read_bytes() for path in (folder / "eval/ckpt_2").glob("*.npz")}
    config.eval.repeats = 3
    run_lib.evaluate(config, folder)
    return folder, config, single, files


def samples_of(folder):
    parts = [np.load(folder / f"samples_{r}.npz")["samples"] for r in (0, 1)]
    return np.concatenate(parts)


def distance(x, y):
    """Frechet distance of Gaussians, by its definition."""
    x, y = (images.reshape(len(images), -1) / 255.0 for images in (x, y))
    a, b = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * roots


def test_three_sets_are_independent_and_the_first_is_that_of_one(evaluated):
    folder, _, _, files = evaluated
    first = folder / "eval/ckpt_2"
    assert {path.name for path in files} == {
        f"{kind}_{r}.npz" for kind in ("samples", "statistics") for r in (0, 1)
    }
    for path, content in files.items():
        assert path.read_bytes() == content
    sets = [samples_of(first)] + [samples_of(first / f"repeat_{i}") for i in (1, 2)]
    assert {x.shape for x in sets} == {(24, 8, 8, 1)}
    every = np.concatenate(sets).reshape(72, -1)
    assert len(np.unique(every, axis=0)) == 72


def test_metrics_are_mean_minimum_and_maximum_of_the_sets(evaluated):
    folder, config, single, _ = evaluated
    report = report_of(folder, 2)
    data = get_dataset(config, "train").permute(0, 2, 3, 1).numpy()
    first = folder / "eval/ckpt_2"
    sets = [samples_of(x) for x in (first, first / "repeat_1", first / "repeat_2")]
    distances = [distance(data, samples) for samples in sets]
    assert report["repeats"] == 3
    assert report["num_samples"] == single["num_samples"] == 24
    assert report["fid"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert report["fid_min"] == pytest.approx(min(distances), rel=1e-4)
    assert report["fid_max"] == pytest.approx(max(distances), rel=1e-4)
    assert single["fid"] == pytest.approx(distances[0], rel=1e-4)
    for key in KEYS:
        assert report[f"{key}_min"] <= report[key] <= report[f"{key}_max"]
        assert report[f"{key}_min"] <= single[key] <= report[f"{key}_max"]
    assert report["fid_data"] == single["fid_data"]


def test_one_set_has_the_entries_that_it_had(evaluated):
    _, _, single, _ = evaluated
    assert "repeats" not in single
    assert not [key for key in single if key.endswith(("_min", "_max"))]
    assert "eval.repeats" not in str(single["settings"])


def test_console_page_and_comparison_show_minimum_mean_and_maximum(evaluated):
    folder = evaluated[0]
    report = report_of(folder, 2)
    mean, least, largest = (float(report[f"fid{end}"]) for end in ("", "_min", "_max"))
    lines = [line.strip() for line in report_table(report, "test", "").splitlines()]
    row = next(i for i, line in enumerate(lines) if line.startswith("Fréchet distance"))
    assert lines[row].endswith(f"{mean:.6g}")
    assert lines[row + 1].split("sets")[1].strip() == f"{least:.6g} to {largest:.6g}"
    page = (folder / "eval/report.html").read_text()
    assert "mean of 3 sets: minimum " in page
    assert "95 %" not in page  # the range takes the place of intervals
    beside = compare_page([read_run(folder, "a", "eval")])
    assert ", 3 sets)" in beside and "95 %" not in beside


def test_another_evaluation_of_three_draws_nothing(evaluated, monkeypatch):
    folder, config, _, _ = evaluated
    before = report_of(folder, 2)

    def draw(*_):
        raise AssertionError("samples that are there are drawn again")

    monkeypatch.setattr("library.evaluated_samples.draw_round", draw)
    run_lib.evaluate(config, folder)
    after = report_of(folder, 2)
    assert all(after[key] == before[key] for key in KEYS)


def test_metrics_of_sets():
    assert over_sets([{"fid": 2.0, "fid_low": 1.0}]) == {"fid": 2.0, "fid_low": 1.0}
    sets = [
        {"fid": 2.0, "fid_low": 1.0, "fid_high": 3.0, "kid": 5.0, "kid_remark": "few"},
        {"fid": 4.0, "fid_low": 1.0, "fid_high": 3.0, "recall": 1.0},
        {"fid": 3.0},
    ]
    expected = {"fid": 3.0, "fid_min": 2.0, "fid_max": 4.0}
    expected |= {"kid": 5.0, "kid_min": 5.0, "kid_max": 5.0, "kid_remark": "few"}
    assert over_sets(sets) == expected
    assert range_of(expected, "fid") == (2.0, 4.0)
    assert range_of({"fid": 1.0}, "fid") is None


def test_a_set_without_finite_samples_does_not_count(evaluated, tmp_path, monkeypatch, caplog):
    """Of three sets of samples, the solver diverges in the second."""
    folder, config, _, _ = evaluated
    draw, whole = evaluated_samples.draw_round, report_of(folder, 2)

    def draw_round(evaluated, r, number):
        result = draw(evaluated, r, number)
        if evaluated.repeat == 1:
            result["samples"] = result["samples"][:0]
        return result

    monkeypatch.setattr(evaluated_samples, "draw_round", draw_round)
    run_lib.evaluate(config, folder, str(tmp_path / "other"))
    assert "24 of 24 samples are not finite" in caplog.text
    report = read_report(tmp_path / "other/report_2.npz")
    assert report["num_samples"] == 0 and report["nonfinite"] == 24  # of the set with the fewest
    first = folder / "eval/ckpt_2"
    data = get_dataset(config, "train").permute(0, 2, 3, 1).numpy()
    distances = [distance(data, samples_of(x)) for x in (first, first / "repeat_2")]
    assert report["fid"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert whole["fid_min"] <= report["fid_min"] <= report["fid_max"] <= whole["fid_max"]
