"""Several feature spaces: computed side by side, and shown in every place that has metrics."""

import logging
import re
from html import escape

import numpy as np
import pytest
from test_compare import report, run
from test_metrics import MeanColour, save_torchscript
from test_report import made_by, page_of
from test_small_runs import report_of, tiny

import run_lib
from metrics.table import METRICS, entries, remarks
from reports.compare import compare_page
from reports.plots import number
from reports.report_file import read_report
from reports.runs import read_run
from reports.settings import obstacle, of_report
from reports.table import report_table
from storage.files import save_npz

BOTH = {"eval.features": "pixels,torchscript-12ab", "eval.num_samples": 100}


def test_two_spaces_in_one_evaluation_are_those_of_two_evaluations(tmp_path, caplog, one_thread):
    """Report, console, page and comparison show each space as an evaluation of its own does."""
    network = save_torchscript(tmp_path / "network.pt", MeanColour())
    spaces = {"pixels": "pixels", "torchscript": "torchscript", "both": "pixels,torchscript"}
    config = tiny("vp/digits_ddpmpp.py", tmp_path, training__snapshot_sampling=False)
    config.eval.update(inception_path=str(network), num_samples=30)
    assert run_lib.train(config, tmp_path / "run")
    for folder, features in spaces.items():
        config.eval.features = features
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run_lib.evaluate(config, tmp_path / "run", folder)
    pixels, scripted, both = (report_of(tmp_path / "run", 2, folder) for folder in spaces)
    assert both["features"] == "pixels,torchscript"
    keys = [key for key in METRICS if METRICS[key].compute]
    compared = [(pixels, key, key) for key in keys]
    compared += [(scripted, key, f"torchscript:{key}") for key in keys]
    compared = [
        (alone, key + what, name + what)
        for alone, key, name in compared
        for what in ("", "_data", "_remark")
        if key + what in alone
    ]
    assert {"fid", "fid_data", "IS"} <= {key for alone, key, _ in compared if alone is scripted}
    for alone, key, name in compared:
        assert both[name] == alone[key]
    assert both["fid"] != both["torchscript:fid"]
    assert "torchscript:IS" in both and "IS" not in both  # pixels have no logits

    labels = {"fid": "Fréchet distance, pixels", "torchscript:fid": "FID, torchscript"}
    values = {label: float(both[key]) for key, label in labels.items()}
    page = (tmp_path / "run/both/report.html").read_text()
    beside = compare_page(
        [read_run(tmp_path / "run", folder, folder) for folder in ("both", "pixels")]
    )
    for label, value in values.items():
        assert re.search(rf"^ +{label} +{re.escape(f'{value:.6g}')}$", caplog.text, re.M)
        assert f"<h3>{escape(label)}</h3><p>{number(value)}" in page  # a card
        assert f"<th>{escape(label)}\u00a0↓</th>" in page  # a column of the checkpoints
        assert f"<tr><td>{escape(label)} ↓</td><td>{number(value)}" in beside
    both, pixels, scripted = map(of_report, (both, pixels, scripted))
    names = [alone.values["eval.features"] for alone in (pixels, scripted)]
    assert both.values["eval.features"].split(",") == names
    digest = scripted.values["reference.digest"]
    assert both.values["torchscript:reference.digest"] == digest
    read = read_report(tmp_path / "run/both/report_2.npz")
    assert {"torchscript:fid", "torchscript:kid_data", "torchscript:half_first"} <= read.keys()


def test_a_metric_has_the_name_of_its_space_only_where_there_are_several():
    one = {"features": "torchscript", "fid": 1.0, "recall": 0.5, "loss": 2.0}
    assert [(e.key, e.label) for e in entries(one)] == [
        ("fid", "FID"),
        ("recall", "Recall"),
        ("loss", "Loss"),
    ]
    two = one | {"features": "torchscript,inception", "inception:recall": 0.25}
    two |= {"inception:fid": 3.0}
    assert [(e.key, e.space, e.label) for e in entries(one, two)] == [
        ("fid", "torchscript", "FID, torchscript"),
        ("inception:fid", "inception", "FID, inception"),
        ("recall", "torchscript", "Recall, torchscript"),
        ("inception:recall", "inception", "Recall, inception"),
        ("loss", "", "Loss"),
    ]
    assert [e.label for e in entries(one, {"features": "pixels", "fid": 4.0})][0] == (
        "Fréchet distance"
    )
    assert remarks({"fid_remark": "few", "inception:fid_remark": "few"}) == [
        "few",
        "inception: few",
    ]
    table = report_table(two | {"seconds": 1.0, "inception:fid_data": 0.125}, "test", "title")
    assert re.search("FID, inception +3\n +of the data +0.125\n", table)


def test_values_are_ranked_by_their_own_space(tmp_path):
    """A run that was also evaluated in another space is as good as one that was not."""
    both = report(1, {"fid": 1.25, "torchscript:fid": 8.5}, **BOTH)
    both["features"] = np.array("pixels,torchscript")
    alone = report(2, {"fid": 2.25})
    page = compare_page([run("a", both), run("b", alone, training__sde="edm")])
    assert "<td>Fréchet distance, pixels ↓</td><td class=best>1.250</td><td>2.250</td>" in page
    assert "<td>FID, torchscript ↓</td><td>8.500</td><td></td>" in page
    other = report(3, {"fid": 2.25, "torchscript:fid": 7.5}, **BOTH)
    other["features"] = both["features"]
    assert obstacle("torchscript:fid", [both, other]) == ""
    other |= report(3, {}, **BOTH | {"eval.features": "pixels,torchscript-34cd"})
    other["features"] = both["features"]
    assert obstacle("fid", [both, other]) == ""
    differs = "eval.features differs (torchscript-12ab; torchscript-34cd)"
    assert obstacle("torchscript:fid", [both, other]) == differs
    page = compare_page([run("a", both), run("c", other, training__sde="edm")])
    assert "<td class=best>7.500</td>" not in page
    assert f"No best FID, torchscript: {differs}." in page


def test_checkpoints_are_compared_in_each_space():
    plain = {"seconds": 1.0, "num_samples": 100, "nonfinite": 0, "nfe": 9.0}
    plain |= {"sampling_seconds": 1.0, "features": "pixels,torchscript"}
    reports = {
        k: plain
        | {"step": k, "fid": 3.0 / k, "torchscript:fid": 4.5 * k}
        | {"settings": made_by(step=k, eval__features="pixels,torchscript-12ab")}
        for k in (1, 2)
    }
    page = page_of(reports)
    assert "class=best>1.500" in page and "class=best>4.500" in page
    assert "<h3>FID, torchscript <small>lower is better</small></h3>" in page


def test_entries_of_a_further_space_are_numbers(tmp_path):
    path = tmp_path / "report_1.npz"
    entry = {"step": 1, "seconds": 1.0, "features": "pixels,torchscript"}
    save_npz(path, **entry, **{"torchscript:fid": np.array("<b>")})
    with pytest.raises(ValueError, match="torchscript:fid is <U3"):
        read_report(path)
