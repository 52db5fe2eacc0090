"""The page of an evaluation, and how a browser without a network shows it."""

import base64
import contextlib
import csv
import io
import itertools
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_configs import load

from metrics.reference import Reference
from metrics.table import METRICS, OF_HALVES, Comparison, compare, compare_halves
from models import NETWORKS, paper_name
from reports import evaluation_page
from reports.html import Picture, legend
from reports.images import by_class, class_rows, image_grid
from reports.page import render
from reports.plots import PALETTE, curve_plot, drawable, histogram, number
from reports.report_file import read_report
from reports.settings import Settings, guidance_words, solver_words, to_json
from reports.table import format_table, report_table
from samplers.base import Sampler
from sampling import SAMPLERS
from storage.files import save_npz
from storage.tensorboard import TensorBoardWriter, seconds_of_training

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["gpu", "quic", "background-networking", "component-update", "sync"]
VOID = {"meta", "img"}


def browse(page, tmp_path, *options):
    """Chromium's standard output for a file, from an empty profile."""
    if BROWSER is None:
        pytest.skip("no Chromium")
    profile = tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    flags = ["--headless", "--no-sandbox", "--no-first-run", f"--user-data-dir={profile}"]
    flags += [f"--disable-{what}" for what in QUIET]
    done = subprocess.run(
        [BROWSER, *flags, *options, f"file://{page}"], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def dumped(page, tmp_path):
    return browse(page, tmp_path, "--dump-dom")


def png(color, size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture
def page():
    random = np.random.RandomState(0)
    report = {"features": np.array("pixels"), "num_samples": 998, "nonfinite": 2, "nfe": 98.0}
    report |= {"kid": -0.001, "precision": 0.8, "recall": 0.5, "IS": np.float64(9.5)}
    report |= {"bpd": 3.5, "bpd_error": 0.02, "bpd_images": 3.5 + random.standard_normal(500)}
    report |= {"bpd_nfe": 120.0, "bpd_seconds": 60.0, "sampling_seconds": 30.0, "seconds": 100.0}
    report |= {"nearest": 1.25, "nearest_data": 1.5}
    report |= {"agreement": 0.97, "agreement_data": 0.98, "accuracy": 0.9}
    report |= {"fid_data": 0.25, "half_first": 998, "half_other": 1234}
    reports = {k: report | {"step": 500 * k, "fid": 3.0 / k} for k in (1, 2, 4)}
    reports = {k: r | {"settings": made_by(step=r["step"])} for k, r in reports.items()}
    return page_of(reports)


def made_by(**changes):
    """The entry `settings` of a report; `changes` have __ in place of the dot."""
    settings = {"step": 8, "weights": "ab", "seed": 1, "eval.num_samples": 1000}
    settings |= {"eval.features": "pixels", "reference.data": "digits", "reference.digest": "cd"}
    settings |= {"sampling.ode_solver": "heun", "sampling.N": 18, "eval.dataset": "test"}
    return to_json(settings | {key.replace("__", "."): value for key, value in changes.items()})


def page_of(reports):
    return render(
        "a <b>bold</b> run",
        reports,
        max(reports),
        facts={"network": "ncsnpp & co"},
        losses={
            "train": [(s, 100 / s) for s in range(1, 2001)],
            "test": [(s, 100 / s) for s in range(200, 2001, 200)],
        },
        pictures=[Picture("Samples", 'of "red"', png((250, 0, 0)))],
        settings={"seed": 42, "model": {"name": "<script>alert(1)</script>"}},
        distances={"<heun>": [(9, 0.5), (35, 0.75)], "dpmpp": [(10, 0.3)]},
        files={"samples": ["ckpt_4/samples_0.npz", 'a "b".npz']},
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []  # every tag is closed in its turn
    kinds = [link.partition(";base64,")[0] for link in tags.links]
    beside = ["ckpt_4/samples_0.npz", "a%20%22b%22.npz"]
    assert kinds == ["data:image/png", "data:text/csv", *beside]
    assert "script" not in tags.seen
    assert not re.search(r"url\(|@import|https?://", page)
    assert page.isprintable() or "\n" in page


def test_page_escapes_what_comes_from_outside(page):
    assert "a &lt;b&gt;bold&lt;/b&gt; run" in page
    assert "ncsnpp &amp; co" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "of &quot;red&quot;" in page


def test_page_says_the_numbers(page):
    assert "0.7500" in page  # 3 / 4
    assert "3.500<small> ± 0.02</small>" in page
    assert "2 of 1,000 samples were not finite" in page
    assert page.count("class=best>0.7500") == 1
    assert all(
        metric.label in page for key, metric in METRICS.items() if key not in ("loss", "nats")
    )


def test_page_shows_the_floor(page):
    """The floor stands below the number, in a row of the table and as a line of the curves."""
    assert "of Gaussian fits to the features; data against data: 0.2500" in page
    assert "998 training images take the place of samples, and 1,234 others" in page
    assert re.search(r"<td>data against data</td>.*?<td>0.2500</td>", page)
    assert page.count('class="floor"') == 3  # two over steps, one over evaluations
    plot = page[page.index("over evaluations of the network for a sample") :]
    marks = [plot.split(f'class="curve-{k}"')[1].split("</g> </g>")[0] for k in (0, 1)]
    assert [mark.count("<use ") for mark in marks] == [2, 1]
    assert "&lt;heun&gt;" in page


def test_more_curves_than_colours_are_told_apart():
    plot = curve_plot([(k, [(0, k), (1, k + 1)]) for k in range(8)], ("x", "y"))
    styles = [re.search(rf'"curve-{k}"> <path [^>]*style="([^"]*)"', plot)[1] for k in range(8)]
    keys = re.findall(r"<i class=[^>]*>", legend(map(str, range(8))))
    assert len({*styles}) == len({*keys}) == 8
    for style, key in zip(styles, keys, strict=True):
        assert ("stroke-dasharray" in style) == ("dashed" in key)
        assert re.search(r"stroke: (var\(--\w+\))", style)[1] in key


def test_numbers_can_be_downloaded(page):
    content = re.search(r"data:text/csv;base64,([^\"]*)", page)[1]
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))
    assert [(row["checkpoint"], float(row["fid"])) for row in rows] == [
        ("1", 3.0),
        ("2", 1.5),
        ("4", 0.75),
    ]
    assert not {"bpd_images", "features"} & rows[0].keys()


def test_browser_shows_the_page_without_a_network(page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page)
    assert "2 of 1,000 samples were not finite" in dumped(path, tmp_path)
    pixels = {}
    for theme, options in {
        "light": [],
        "dark": ["--blink-settings=preferredColorScheme=0"],
    }.items():
        shot = tmp_path / f"{theme}.png"
        browse(path, tmp_path, "--window-size=1200,2400", f"--screenshot={shot}", *options)
        pixels[theme] = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        assert pixels[theme].shape == (2400, 1200, 3)
        red = (np.abs(pixels[theme] - (250, 0, 0)) < 8).all(2)
        assert red.sum() > 100 * 100  # the picture, enlarged
    assert np.median(pixels["light"]) > 220
    assert np.median(pixels["dark"]) < 60
    ink = np.abs(pixels["light"] - np.median(pixels["light"], axis=(0, 1))).max(2) > 60
    assert ink.any(1).mean() > 0.2  # there is something on many of the lines


@pytest.mark.parametrize(
    "name, value, ranked",
    [
        ("sampling.N", 2, True),
        ("sampling.guidance", 2.0, True),
        ("eval.num_samples", 100, False),
        ("eval.features", "torchscript-00000000", False),
        ("reference.digest", "other", False),
    ],
)
def test_checkpoints_of_other_settings_are_no_curve(name, value, ranked):
    """Differing settings are columns; the best is marked where distances are of one kind."""
    report = {"seconds": 1.0, "num_samples": 100, "nonfinite": 0, "nfe": 9.0, "features": "pixels"}
    report |= {"sampling_seconds": 1.0}
    reports = {k: report | {"step": k, "fid": 3.0 / k, "settings": made_by(step=k)} for k in (1, 2)}
    page = page_of(reports)
    assert "class=best>1.500" in page and page.count("class=trends") == 1
    assert "not evaluated alike" not in page and "No best" not in page
    reports[1]["settings"] = made_by(step=1, **{name.replace(".", "__"): value})
    page = page_of(reports)
    assert f"<th>{name}</th>" in page and f"<td>{value}</td></tr>" in page
    assert f"not evaluated alike ({name})" in page and "class=trends" not in page
    content = re.search(r"data:text/csv;base64,([^\"]*)", page)[1]
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))
    assert [row[name] == str(value) for row in rows] == [True, False]
    assert ("class=best>1.500" in page) == ranked
    assert (f"No best Fréchet distance: {name} differs" in page) != ranked


def test_checkpoints_of_older_reports_are_not_ranked():
    report = {"seconds": 1.0, "loss": 1.0}
    reports = {k: report | {"step": k, "loss": 1.0 / k} for k in (1, 2)}
    reports[2]["settings"] = made_by(step=2)
    page = page_of(reports)
    assert "<th>other settings</th>" in page and "<td>not known</td></tr>" in page
    assert "class=best" not in page and "No best Loss: " in page


def test_finite_samples_of_other_numbers_are_not_ranked():
    report = {"seconds": 1.0, "nonfinite": 0, "nfe": 9.0, "sampling_seconds": 1.0}
    reports = {
        k: report | {"step": k, "fid": 3.0 / k, "num_samples": 10 * k, "settings": made_by(step=k)}
        for k in (1, 2)
    }
    page = page_of(reports)
    assert "class=best" not in page and "eval.num_samples differs (10 finite; 20 finite)" in page


# --- doubts ---------------------------------------------------------------------------------------


def doubted(**entries):
    """Reports of two checkpoints, the second with the lower distance."""
    report = {"seconds": 1.0, "num_samples": 40, "nonfinite": 0, "nfe": 9.0, "features": "pixels"}
    report |= {"sampling_seconds": 1.0, "loss": 1.0} | entries
    return {
        k: report | {"step": k, "fid": 3.0 / k, "kid": 0.3 / k, "settings": made_by(step=k)}
        for k in (1, 2)
    }


def test_a_doubt_stands_beside_its_number_which_is_not_bold():
    remark = "40 samples are too few for <64> features"
    page, plain = page_of(doubted(fid_remark=remark)), page_of(doubted())
    assert "class=best>1.500" in plain and "class='card doubted'" not in plain
    card = page[page.index("class='card doubted'") :].partition("</div>")[0]
    assert "<p>1.500" in card and "40 samples are too few for &lt;64&gt; features.</span>" in card
    assert page.count("class='card doubted'") == 1
    assert "class=best>1.500" not in page and "class=best>0.1500" in page  # the kernel distance
    assert "No best Fréchet distance: 40 samples are too few" in page


def test_a_remark_on_no_number_stands_below_the_cards():
    page = page_of(doubted(bpd_error_remark="left out: standard error of bits/dim"))
    assert "<p class=warning>left out: standard error of bits/dim.</p>" in page
    assert "class='card doubted'" not in page


def test_too_few_samples_are_a_remark_of_the_distance():
    random = np.random.default_rng(0)
    data = Reference.measure([random.standard_normal((200, 6))], 200, 200)
    reports = [compare(Comparison(random.standard_normal((n, 6)), None, data)) for n in (6, 7)]
    assert reports[0]["fid_remark"].startswith("6 samples are too few for a covariance of 6 feat")
    assert "fid" in reports[0] and "fid_remark" not in reports[1]


# --- restorations ---------------------------------------------------------------------------------


def test_the_page_has_the_psnr_of_restorations_and_says_why_one_is_worse(tmp_path):
    report = {"step": 5, "seconds": 9.0, "restore_images": 8, "restore_spread": 0.125}
    report |= {"restore_nfe": 35.0, "restore_seconds": 4.0, "restore_psnr": 20.25}
    report |= {"restore_psnr_mean": 22.5, "restore_psnr_plain": 21.75}
    save_npz(tmp_path / "report_1.npz", **report)
    page = page_of({1: read_report(tmp_path / "report_1.npz")})
    table = page[page.index("<h2>Restoration</h2>") :].partition("</table>")[0]
    heads, cells = (re.findall(f"<{tag}>(.*?)</{tag}>", table) for tag in ("th", "td"))
    assert len(heads) == len(cells) and cells[:4] == ["8", "20.25", "22.50", "21.75"]
    assert "one restoration" in heads[1] and "mean" in heads[2] and "plain" in heads[3]
    assert "Blau and Michaeli, 2018" in page and "<h2>Checkpoints</h2>" not in page
    for key in ("restore_psnr", "restore_psnr_mean", "restore_psnr_plain"):
        del report[key]  # the truth is not known
    page = page_of({1: report})
    assert "<h2>Restoration</h2>" in page and "Blau" not in page


# --- classes --------------------------------------------------------------------------------------


def test_rows_of_a_picture_have_their_names(tmp_path):
    names = ["cats", "dogs & <wolves>", "a name that is much too long to stand beside a picture"]
    picture = Picture("Samples", "By class.", png((9, 9, 9), (90, 30)), rows=names)
    html = picture.html()
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and tags.seen.count("li") == 3
    assert "dogs &amp; &lt;wolves&gt;</li>" in html
    assert "<ol>" not in Picture("Samples", "All.", png((9, 9, 9))).html()


def test_rows_of_classes():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None]
    rows = by_class(images, np.array([2, 0, 2, 2, 0, 2]), 3, 3)[:, 0, 0, 0]
    assert rows.reshape(3, 3).tolist() == [[1, 4, 128], [128, 128, 128], [0, 2, 3]]
    assert [class_rows(n, -1) for n in (0, 3, 10, 11)] == [0, 3, 10, 0]
    assert class_rows(3, 1) == 0


@pytest.mark.parametrize(
    "sampling, words",
    [
        ({}, ""),
        ({"class_label": 3}, "class 3"),
        ({"guidance": 2.0, "guidance_interval": []}, "guidance 2.0"),
        ({"guidance": 2.0, "guidance_interval": [0.5, 3]}, "guidance 2.0 at noise levels 0.5 to 3"),
        ({"guidance": 1.5, "guide": "ab"}, "guidance 1.5 by the network ab"),
    ],
)
def test_guidance_in_words(sampling, words):
    settings = Settings({f"sampling.{key}": value for key, value in sampling.items()})
    assert guidance_words(settings) == words


@pytest.mark.parametrize(
    "sampling, words",
    [
        ({"ode_solver": "heun", "N": 9, "S_churn": 0.5}, "heun, 7 calls, 9 steps, churn 0.5"),
        (
            {"ode_solver": "rk45", "schedule": "its own", "rtol": 0.1, "atol": 0.2, "S_churn": 0},
            "rk45, 7 calls, rtol 0.1, atol 0.2",
        ),
        # the churn of another sampler does not count
        (
            {"method": "pc", "predictor": "a", "corrector": "b", "S_churn": 1},
            "a and b, 7 calls",
        ),
        (
            {"method": "consistency", "levels": [0.5]},
            "consistency, 7 calls, noise levels 0.5",
        ),
        ({"method": "consistency"}, "consistency, 7 calls"),
        ({"method": "one_step", "N": 9}, "one step, 7 calls, of 9"),
        ({"method": ["of a stranger"]}, "['of a stranger'], 7 calls"),
    ],
)
def test_a_sampler_says_which_of_its_settings_count(sampling, words, monkeypatch):
    class OneStep(Sampler):
        @classmethod
        def words(cls, values):
            return "one step", f"of {values['N']}"

    monkeypatch.setitem(SAMPLERS, "one_step", OneStep)
    settings = Settings({f"sampling.{key}": value for key, value in sampling.items()})
    assert solver_words(settings, "7 calls") == words


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(0.8, "0.8000"), (-0.0011843, "−0.001184"), (1000, "1,000"), (98.0, "98"), (np.nan, "–")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "low, high, marks",
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (-1, 1, ["−1", "−0.5", "0", "0.5", "1"]),
        (0.07, 3, ["0.1", "0.2", "0.5", "1", "2"]),  # far apart: logarithmic
        (1, 1e5, ["1", "10", "100", "1k", "10k", "100k"]),
    ],
)
def test_ticks_are_round_numbers(low, high, marks):
    plot = curve_plot([(0, [(5, low), (6, high)])], ("step", "loss"))
    of_y = plot[plot.index('class="matplotlib.axis_2"') : plot.index('class="curve-0"')]
    texts = re.findall(r"<text style=\"([^\"]*)\" x=\"\S+\" y=\"(\S+)\"[^>]*>(.*?)</text>", of_y)
    *ticks, (style, _, title) = texts
    assert ([text for *_, text in ticks], title) == (marks, "loss")
    assert "text-anchor: middle" in style
    heights = np.array([float(y) for _, y, _ in ticks])
    values = np.array([float(m.replace("−", "-").replace("k", "e3")) for m in marks])
    if low > 0:
        values = np.log(values)
    slopes = np.diff(heights) / np.diff(values)
    assert (slopes < 0).all() and slopes == pytest.approx(slopes[0], rel=1e-3)


NUMBERS = [0.0, -1.0, 1e-300, 0.7, 1e30, -1e300, math.inf, math.nan]


@pytest.mark.parametrize("low, high", [*itertools.combinations_with_replacement(NUMBERS, 2)])
def test_plots_of_any_numbers_are_drawn(low, high):
    """Points and bars where an axis can hold the numbers, and no mark at one that it cannot."""
    values = np.array([low, high])
    plot = curve_plot([(0, [(1, low), (2, high)])], ("step", "loss"), floor=high, with_range=True)
    assert ('class="curve-0"' in plot) == bool(plot) == drawable(values).any()
    if len(values := values[drawable(values)]):
        plot += histogram(values, ("bits/dim", "images"))
        assert 'class="mean"' in plot
    assert not re.search(r"nan|inf|e\+?\d", " ".join(re.findall(r' d="(.*?)"', plot)))


def test_a_plot_is_the_same_svg_each_time_and_of_the_pages_colours():
    def draw():
        points = [(s, 100 / s) for s in range(1, 50)]
        return curve_plot([(0, points)], ("x", "y"), floor=2.0, with_range=True, dots=[(9, 3.0)])

    plot = draw()
    assert plot == draw()
    assert "#" not in re.sub(r"href=\"#\w+\"", "", plot) and "var(--blue)" in plot
    assert set(re.findall(r"var\(--(\w+)\)", plot)) <= PALETTE.keys()


def test_startup_imports_no_matplotlib():
    """Matplotlib is imported only for a page that has a plot."""
    words = "import sys, run_lib, reports.compare; print('matplotlib' in sys.modules)"
    command = [sys.executable, "-c", words]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout == b"False\n"


def test_a_single_checkpoint_has_no_curve_over_checkpoints():
    report = {"step": 10, "loss": 1.0, "seconds": 1.0}
    page = render("run", {1: report}, 1, losses={"train": [(5, np.nan)]})
    assert "<svg" not in page
    assert "<figure" not in page
    assert "1" in page


# --- what the page is made of ---------------------------------------------------------------------


def test_halves_of_the_data():
    """The closed form of Gaussians: a distance of halves is that of the errors of their moments."""
    random = np.random.default_rng(0)
    data = random.standard_normal((4000, 3))
    reference = Reference.measure([data], 4000, 4000)
    halves = compare_halves(Comparison(np.full((500, 3), 9.0), None, reference))
    assert tuple(halves) == OF_HALVES
    assert (halves["half_first"], halves["half_other"]) == (500, 2000)
    # means err by tr(C) / n; covariances by (K^2 + K) / (4 n) where C = 1
    expected = (3 + (9 + 3) / 4) * (1 / 500 + 1 / 2000)
    assert 0.2 * expected < halves["fid_data"] < 3 * expected
    assert abs(halves["kid_data"]) < 0.02
    assert halves["precision_data"] > 0.9
    whole = compare_halves(Comparison(np.zeros((9000, 3)), None, reference))
    assert (whole["half_first"], whole["half_other"]) == (2000, 2000)


def test_networks_have_the_names_of_papers():
    names = {
        "poisson/cifar10_ddpmpp.py": "DDPM++",
        "poisson/cifar10_ncsnpp.py": "NCSN++",
        "vp/cifar10_ncsnpp.py": "NCSN++",
        "edm/cifar10_ddpmpp.py": "DDPM++",
        "edm/cifar10_ncsnpp.py": "NCSN++",
        "edm/imagenet64_adm.py": "ADM",
        "edm2/imagenet64_xs.py": "EDM2",
        "pfgmpp/digits_dit.py": "DiT",
        "vp/ddpm/cifar10.py": "DDPM",
    }
    models = {path: load(path).model for path in names}
    assert {path: paper_name(model.name, model.fir) for path, model in models.items()} == names
    config = load("poisson/cifar10_ddpmpp.py")
    for config.model.name in NETWORKS:
        assert paper_name(config.model.name, config.model.fir) != config.model.name
    config.model.name = "own"
    assert paper_name(config.model.name, config.model.fir) == "own"


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "< 1 s"), (61, "1 min 1 s"), (7200, "2 h"), (90061, "1 d 1 h"), (0, ""), (np.nan, "")],
)
def test_durations(seconds, text):
    assert evaluation_page.duration(seconds) == text


def test_distances_of_one_checkpoint_are_gathered(tmp_path, caplog):
    """Points of each sampler, whatever its number of steps, from reports equal in all else."""
    heun = {"step": 8, "seconds": 1.0, "fid": 0.5, "features": "pixels", "num_samples": 10}
    heun |= {"nfe": 35.0, "nonfinite": 0, "sampling_seconds": 1.0}

    def save(folder, changes, **settings):
        report = heun | {"settings": made_by(**settings)} | changes
        save_npz(tmp_path / folder / "report_4.npz", **report)
        return read_report(tmp_path / folder / "report_4.npz")

    def gathered():
        return evaluation_page.by_evaluations(tmp_path / "a", 4, heun_report)

    heun_report = save("a", {})
    assert gathered() == {"heun": [(35, 0.5)]}
    five = {"nfe": 9.0}, {"sampling__N": 5}
    save("b", five[0] | {"fid": 2.0}, **five[1])
    save("c", five[0] | {"num_samples": 9}, **five[1])
    for folder, other in {
        "d": {"step": 6},
        "e": {"weights": "other"},
        "f": {"eval__ema_std": 0.1},
        "g": {"eval__num_samples": 11},
        "h": {"eval__features": "torchscript-12345678"},
        "i": {"reference__digest": "other"},
        "j": {"sampling__class_label": 3},
    }.items():
        save(folder, five[0], **five[1] | other)
    save_npz(tmp_path / "k/report_4.npz", **heun, settings="[" * 10_000)
    save_npz(
        tmp_path / "l/report_4.npz", **heun, sampling=json.dumps({"ode_solver": "heun", "N": 5})
    )
    with caplog.at_level(logging.INFO):
        assert gathered() == {"heun": [(9, 2), (35, 0.5)]}
    assert {f for f in "abcdefghijkl" if f"{f}/report_4.npz" in caplog.text} == {*"cdefghijkl"}
    save("m", {"nfe": 10.0}, sampling__ode_solver="dpmpp", sampling__N=10)
    (tmp_path / "n").mkdir()
    (tmp_path / "n/report_4.npz").write_bytes(b"damaged")
    distances = gathered()
    assert distances["ode_solver=heun"] == [(9, 2), (35, 0.5)]
    assert distances["ode_solver=dpmpp"] == [(10, 0.5)]
    save("o", {"nfe": 18.0, "fid": 1.0}, sampling__N=5, sampling__guidance=2.0)
    assert gathered()["ode_solver=heun, guidance=2.0"] == [(18, 1)]
    report = save("q/a", {}, sampling__method="field_lines")
    curves = evaluation_page.by_evaluations(tmp_path / "q/a", 4, report)
    assert curves == {"field lines": [(35, 0.5)]}


def test_time_of_training_over_two_starts(tmp_path, monkeypatch):
    """The second one goes on from step 2, a day later."""
    now = [0.0]
    monkeypatch.setattr("storage.tensorboard.time.time", lambda: now[0])
    for start, times in ((0, (10, 11, 15, 100)), (2, (86400, 86402, 86409))):
        now[0] = times[0]
        with contextlib.closing(TensorBoardWriter(tmp_path, start)) as writer:
            for step, now[0] in enumerate(times[1:], start + 1):
                writer.add_scalars({"loss": 1.0}, step)
    assert seconds_of_training(tmp_path, 2) == pytest.approx(15 - 10)
    assert seconds_of_training(tmp_path, 4) == pytest.approx((100 - 10) + (86409 - 86400))


# --- pictures and tables --------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image_once(channels):
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * 20
    images = np.broadcast_to(images, (5, 4, 6, channels))
    grid = image_grid(images, min_size=8, gap=1)
    assert grid.shape == (2 * 9 + 1, 3 * 13 + 1, 3)  # 2 x 3 cells, each image enlarged twice
    for i in range(5):
        top, left = 1 + i // 3 * 9, 1 + i % 3 * 13
        assert (grid[top : top + 8, left : left + 12] == i * 20).all()
    assert (grid[-1] == 128).all()
    assert image_grid(images, columns=5, min_size=8, gap=1).shape == (9 + 1, 5 * 13 + 1, 3)


def test_table_is_aligned():
    table = format_table([("a", "1"), ("longer", "2")], "title")
    assert table == "title\n  a       1\n  longer  2"


def test_table_of_a_report():
    report = {"loss": 2.0, "bpd": 3.5, "bpd_error": 0.021, "bpd_nfe": 50.0, "encoding_error": 0.1}
    report |= {"features": np.array("pixels"), "fid": 15.55193, "num_samples": 230, "nfe": 3.0}
    report |= {"nonfinite": 2, "nearest": 4.5, "nearest_data": 1.25, "seconds": 3.0}
    lines = [line.split("  ") for line in report_table(report, "test", "title").splitlines()]
    rows = {words[1] or words[2]: words[-1].strip() for words in lines[1:]}
    assert rows["Fréchet distance, pixels"] == "15.5519"
    assert rows["Bits/dim (test)"] == "3.5 +- 0.021"
    assert rows["Loss (test)"] == "2"
    assert rows["Nearest training image"] == "4.5"
    assert rows["of the data"] == "1.25"
    assert "Inception Score" not in rows
    assert rows["not finite"] == "2"
