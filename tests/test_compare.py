"""Runs side by side: what differs, seeds together, the best marked, and the whole page."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from test_configs import load
from test_report import Tags, dumped

from configs.keys import flatten
from reports import compare
from reports.compare import Run, compare_page, differing, grouped, read_run
from storage import run_config
from storage.files import save_npz, save_png
from storage.tensorboard import TensorBoardWriter


def run(name, report=None, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, format="png")
    curves = {"loss/train": [(s, 10 / s) for s in (1, 2, 4)], "loss/test": [(4, float("nan"))]}
    config = flatten(load("vp/toy_mlp.py")) | changes
    return Run(name, config, curves, report or {}, buffer.getvalue())


@pytest.fixture
def runs():
    return [
        run("a/<1>", {"step": 10, "fid": 1.0, "loss": 5.0}, seed=1),
        run("a/2", {"step": 10, "fid": 2.0, "loss": 7.0}, seed=2),
        run("b", {"step": 20, "fid": 1.75, "loss": 1.0}, training__sde="edm", optim__lr=0.5),
        run("c", optim__lr=0.5),
    ]


def test_what_differs_and_what_is_one_setting(runs):
    groups = grouped(runs)
    assert [[r.name for r in group] for group in groups] == [["a/<1>", "a/2"], ["b"], ["c"]]
    assert differing(groups) == {
        "training.sde": ["vpsde", "edm", "vpsde"],
        "optim.lr": ["0.002", "0.5", "0.5"],
    }
    assert differing(groups[:1]) == {}


def rows(page):
    """{first cell: [(text, whether it is marked)]} of all tables."""
    found = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", page, re.DOTALL)
    cells = r"<td( class=best)?>(.*?)</td>"
    return {k: [(t, bool(b)) for b, t in re.findall(cells, v, re.DOTALL)] for k, v in found}


def test_page_marks_the_best_mean(runs):
    page = compare_page(runs)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "a/&lt;1&gt;, a/2" in page
    assert "<1>" not in page
    found = rows(page)
    # 1.5 is the mean of 1 and 2; c has no report
    fid = [("1.500\n(1 to 2)", True), ("1.750", False), ("", False)]
    assert next(v for k, v in found.items() if k.startswith("Fréchet distance")) == fid
    # another method's loss is of another kind
    loss = next(v for k, v in found.items() if k.startswith("Loss"))
    assert [marked for _, marked in loss] == [False, False, False]
    assert found["optim.lr"][1:] == [("0.5", False)] * 2
    assert page.count('<path class="line c0"') == 2  # two seeds
    assert page.count('<path class="line c2"') == 1
    assert len(tags.links) == 3  # a picture for each setting


def test_seeds_alone(runs):
    page = compare_page(runs[:2])
    assert "None but the seed" in page
    assert "class=best" not in page
    assert "No run is evaluated yet" in compare_page(runs[3:])


def test_from_workdirs_to_a_page(tmp_path, monkeypatch, capsys):
    for name, rate in (("one", 0.001), ("two", 0.1)):
        config = load("vp/toy_mlp.py")
        config.optim.lr = rate
        folder = tmp_path / name
        folder.mkdir()
        run_config.store(folder, config)
        with TensorBoardWriter(folder / "tensorboard", 0) as writer:
            writer.add_scalar("loss/train", rate, 5)
        for k in (2, 10):
            save_npz(folder / f"eval/report_{k}.npz", step=100 * k, seconds=1.0, fid=rate + k)
        save_png(folder / "samples/iter_9/sample.png", np.full((8, 8, 3), 9, np.uint8))
        save_png(folder / "samples/iter_10/sample.png", np.full((8, 8, 3), 200, np.uint8))
    found = read_run(tmp_path / "one", "one", "eval")
    assert (found.report["step"], found.curves["loss/train"][0][0]) == (1000, 5)
    assert np.asarray(Image.open(io.BytesIO(found.picture))).max() == 200
    out = tmp_path / "page.html"
    command = ["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    compare.main()
    assert rows(out.read_text())["optim.lr"] == [("0.001", False), ("0.1", False)]
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "none"), "--out", str(out)])
    with pytest.raises(SystemExit):
        compare.main()
    assert "none carries a config" in capsys.readouterr().err
    assert "2 runs side by side" in dumped(out, tmp_path)
