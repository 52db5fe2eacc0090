"""Runs on very few images: training and evaluation work, or one line says what to do."""

import itertools
import warnings

import numpy as np
import pytest
from data_files import encoded, pictures
from test_small_runs import report_of, tiny

import run_lib
from metrics.distances import Gaussian
from metrics.reference import Reference
from metrics.table import METRICS, Comparison, compare, compare_halves, remarks
from reports.compare import compare_page
from reports.page import render
from reports.runs import read_run
from reports.table import report_table
from storage import run_config

METHODS = ("poisson", "pfgmpp", "vp")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def write(folder, images, split=False, classes=0):
    """Grey images (n, 8, 8, 1), in one folder or the same ones in both splits."""
    for where, (i, image) in itertools.product(
        ("train", "test") if split else ("",), enumerate(images)
    ):
        place = folder / where / (f"c{i % classes}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(encoded(image[..., 0]))


def run(tmp_path, method, **overrides):
    """The report of a run on tmp_path/images, and its page and comparison."""
    options = {"data__path": str(tmp_path / "images"), "data__image_size": 8}
    options |= {"eval__enable_sampling": True, "eval__enable_bpd": True, "eval__num_samples": 8}
    options |= {"eval__features": "pixels", "sampling__rtol": 1.0, "sampling__atol": 1.0}
    options |= {"eval__bpd_num_repeats": 1} | overrides
    workdir = tmp_path / "run"
    assert run_lib.train(tiny(f"{method}/images32_ddpmpp.py", tmp_path, **options), workdir)
    run_lib.evaluate(run_config.load(workdir), workdir)
    pages = (
        (workdir / "eval/report.html").read_text(),
        compare_page([read_run(workdir, "a", "eval")]),
    )
    return report_of(workdir, 2), *pages


def check(report, *pages, missing=()):
    """Reports have no empty number; every page names the metrics that are left out."""
    for name, value in report.items():
        assert value.dtype.kind != "f" or np.isfinite(value).all(), name
    words = remarks(report)
    for label in missing:
        assert [word for word in words if word.startswith("left out") and label in word]
    for page, word in itertools.product(pages, words):
        assert word.replace("'", "&#x27;") in page
    table = report_table(report, "test", "title")
    assert all(word in table for word in words)
    assert "nan" not in table


FIRST = ("Fréchet distance", "Kernel distance", "Precision", "Nearest training image of the data")
BITS = "standard error of bits/dim"
HALVES = "data against data"


@pytest.mark.parametrize("method", METHODS)
def test_two_images_give_what_one_to_train_on_gives(tmp_path, method):
    write(tmp_path / "images", pictures(2, channels=1))
    report, *pages = run(tmp_path, method)
    assert {"nearest", "bpd", "loss"} <= report.keys()
    assert not {"fid", "kid", "precision", "nearest_data", "bpd_error"} & report.keys()
    check(report, *pages, missing=(*FIRST, BITS, HALVES))


@pytest.mark.parametrize("method", METHODS)
def test_three_images(tmp_path, method):
    write(tmp_path / "images", pictures(3, channels=1))
    report, *pages = run(tmp_path, method)
    assert {"nearest", "nearest_data", "fid", "kid", "bpd"} <= report.keys()
    assert not {"precision", "recall", "bpd_error", "fid_data"} & report.keys()
    check(report, *pages, missing=("Precision, Recall", BITS, HALVES))


@pytest.mark.parametrize("method", METHODS)
def test_one_image_in_both_splits(tmp_path, method):
    write(tmp_path / "images", pictures(1, channels=1), split=True)
    check(*run(tmp_path, method), missing=(*FIRST, BITS, HALVES))


@pytest.mark.parametrize("kind", ["folder", "npy"])
def test_one_image_without_splits_is_one_line(tmp_path, kind):
    images, path = pictures(1, channels=1), tmp_path / "images"
    write(path, images)
    if kind == "npy":
        path = tmp_path / "images.npy"
        np.save(path, images)
    with pytest.raises(ValueError, match=r"1 image\(s\) cannot be split.*train and test") as error:
        run(tmp_path, "pfgmpp", data__path=str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("grey", [0, 100, 255])
def test_images_that_are_all_equal(tmp_path, grey):
    write(tmp_path / "images", np.full((20, 8, 8, 1), grey, np.uint8))
    report, *pages = run(tmp_path, "poisson")
    assert report["nearest_data"] == 0
    assert report["fid"] >= 0
    check(report, *pages)


def test_black_images_of_norm_0_are_one_line(tmp_path):
    write(tmp_path / "images", np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="all training images are black.*set data.centered=True"):
        run(tmp_path, "poisson", data__centered=False)


@pytest.mark.parametrize("split", [False, True])
def test_one_class(tmp_path, split):
    write(tmp_path / "images", pictures(9, channels=1), split, classes=1)
    options = {"data__num_classes": -1, "eval__enable_classification": True}
    report, *pages = run(tmp_path, "pfgmpp", **options)
    assert report["accuracy"] == 1
    check(report, *pages, missing=("Agreement with the labels",))


# --- samples against data -------------------------------------------------------------------------


def compared(samples, images, width=2):
    random = np.random.default_rng(0)
    real = random.standard_normal((images, width))
    reference = Reference.measure([real], images, images)
    return Comparison(random.standard_normal((samples, width)), None, reference)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 3000])
@pytest.mark.parametrize("images", [1, 2, 3, 4, 30])
def test_of_few_each_metric_is_a_number_or_said(samples, images):
    scores = compare(compared(samples, images))
    words = " ".join(word for word in remarks(scores) if word.startswith("left out"))
    for key in ("fid", "kid", "precision", "recall", "nearest"):
        assert (key in scores) != (METRICS[key].label in words.replace("image of the data", "")), (
            key
        )
    assert ("fid" in scores) == ("kid" in scores) == (min(samples, images) > 1)
    assert ("precision" in scores) == (min(samples, images) > 3)
    assert ("nearest_data" in scores) == (images > 1)
    assert all(np.isfinite(v) for v in scores.values() if not isinstance(v, str))


def test_halves_of_few_are_refused_with_a_reason():
    assert compare_halves(compared(4, 8))["half_first"] == 4
    for samples, images in ((4, 7), (3, 8), (1, 1)):
        with pytest.raises(ValueError, match=f"needs 8 .* 4 samples, not {images} and {samples}"):
            compare_halves(compared(samples, images))


@pytest.mark.parametrize(
    "shift, words", [(0.0, "equal a training image: copies"), (0.01, "samples lie nearer"), (9, "")]
)
def test_samples_nearer_to_training_images_than_these_to_each_other(shift, words):
    c = compared(50, 50, width=8)
    c.features = c.reference.features + shift
    scores = compare(c)
    assert words in scores.get("nearest_remark", "")
    assert bool(words) == ("nearest_remark" in scores)
    assert bool(words) == (scores["nearest"] < scores["nearest_data"])
    report = scores | {"step": 1, "seconds": 1.0}
    page = render("t", {1: report}, 1)
    assert (words or "nearer to training") in page if words else "nearer" not in page
    assert not words or words in report_table(report, "test", "t")


def test_moments_alone_say_nothing_of_neighbours():
    a, b = np.random.default_rng(0).standard_normal((2, 9, 2))
    report = compare(Comparison(a, None, Reference(Gaussian.fit(b))))
    assert report.keys() == {"fid", "fid_low", "fid_high"}
