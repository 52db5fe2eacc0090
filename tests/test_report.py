"""The page of an evaluation, and how a browser without a network shows it."""

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from metrics.table import METRICS
from reports.images import image_grid
from reports.page import Picture, render
from reports.plots import Axis, number
from reports.table import format_table, report_table

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
    reports = {k: report | {"step": 500 * k, "fid": 3.0 / k} for k in (1, 2, 4)}
    return render(
        title="a <b>bold</b> run",
        facts={"network": "ncsnpp & co"},
        reports=reports,
        shown=4,
        curves={
            "train": [(s, 100 / s) for s in range(1, 2001)],
            "test": [(s, 100 / s) for s in range(200, 2001, 200)],
        },
        pictures=[Picture("Samples", 'of "red"', png((250, 0, 0)))],
        config={"seed": 42, "model": {"name": "<script>alert(1)</script>"}},
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
    assert tags.links == ["data:image/png;base64," + tags.links[0].partition(",")[2]]
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
    assert all(metric.label in page for key, metric in METRICS.items() if key != "loss")


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


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(0.8, "0.8000"), (-0.0011843, "−0.001184"), (1000, "1,000"), (98.0, "98"), (np.nan, "–")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "low, high, logarithmic, marks",
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (-1, 1, False, [-1, -0.5, 0, 0.5, 1]),
        (0.07, 3, True, [0.1, 0.2, 0.5, 1, 2]),
        (1, 1e5, True, [1, 10, 100, 1000, 1e4, 1e5]),
    ],
)
def test_ticks_are_round_numbers(low, high, logarithmic, marks):
    axis = Axis(low, high, 100, 200, logarithmic)
    assert axis.ticks() == pytest.approx(marks)
    assert axis(low) == pytest.approx(100)
    assert axis(high) == pytest.approx(200)


def test_a_single_checkpoint_has_no_curve_over_checkpoints():
    report = {"step": 10, "loss": 1.0, "seconds": 1.0}
    page = render("run", {}, {1: report}, 1, {"train": [(5, np.nan)]}, [], {})
    assert "<svg" not in page
    assert "<figure" not in page
    assert "1" in page


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
