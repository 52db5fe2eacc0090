"""The commands of docs/data.md on small data, the page of --mode data, and Hugging Face's names."""

import base64
import contextlib
import io
import logging
import re
import runpy
import shlex
from types import SimpleNamespace

import fake_pyarrow
import numpy as np
import pytest
import torch
from conftest import ROOT
from data_files import (
    encoded,
    pictures,
    png_of_16_bits,
    stylegan_example,
    tfrecord,
    tiff,
    write_tree,
    write_zip,
)
from own_files import (
    NAMES,
    cifar_binary,
    cifar_python,
    examples,
    has_pyarrow,
    mnist,
    write_files,
    write_parquet,
    write_tar,
)
from PIL import Image
from test_small_runs import tiny
from warm_start import MAIN, Program, run_main

import run_lib
from library import step_cost
from storage.checkpoints import load_checkpoint

PAGE = (ROOT / "docs/data.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
LINES = [line for kind, b in BLOCKS if not kind for line in b.replace("\\\n", " ").splitlines()]
COMMANDS = [*map(shlex.split, LINES)]
SMALL = shlex.split(
    "--config.training.n_iters=20 --config.training.batch_size=8 --config.model.nf=8 "
    "--config.training.small_batch_size=0 --config.training.precision=fp32 "
    "--config.model.ch_mult='(1,)' --config.model.attn_resolutions='()' "
    "--config.model.num_res_blocks=1 --config.data.num_workers=0 "
    "--config.sampling.ode_solver=heun --config.sampling.N=2 --config.data.image_size=8"
)
SAID = {  # by workdir, what the line on the data says
    "look": r"photos, \d+ images .*a tenth is held out by names",
    "folder": r"photos, \d+ images .*2 classes \(0 ant, 1 bee\)",
    "splits": r"imagenet, 12 images to train on and 5 .*\(train and val\).*; the test split has no",
    "scans": r"scans, \d+ images .*1 channel,",
    "counts": r"counts, \d+ images .*8 x 8, 1 channel,",
    "zip": r"cifar10-32x32.zip, 12 images to train on and 12 to test on \(none is held out",
    "array": r"images.npy, 11 images to train on and 1 to test on \(a random tenth is held out\)",
    "arrays": r"images.npz, 11 images .*10 classes",
    "tar": r"examples.tar, \d+ images .*10 classes",
    "tars": r"shards/set-\{000000\.\.000002\}.tar, \d+ images .*10 classes",
    "parquet": r"hub, 6 images to train on and 6 to test on \(train and test\).*10 classes \(0 ant",
    "cifar10": r"cifar-10-python.tar.gz, 10 images to train on and 2 .*\(train and test\).*\(0 ant",
    "binary": r"cifar-10-binary.tar.gz, 10 images to train on and 2 .*\(0 ant",
    "mnist": r"mnist, 8 images to train on and 4 to test on \(train and test\), 8 x 8, 1 channel,",
    "idx": r"train-images-idx3-ubyte.gz, 7 images to train on and 1 to test on \(a random tenth",
    "digits": r"digits, 1,617 images to train on and 180 to test on, 8 x 8, 1 channel,",
    "ffhq": r"ffhq, 11 images to train on and 1 to test on, 8 x 8, 3 channels,",
    "published": r"cifar-10-python.tar.gz, 10 images to train on and 2 .*transformed at random",
    "latents": r"photos, \d+ images .*8 x 8, 3 channels,",
    "patients": r"scans, \d+ images .*\(a share of 0.25 is held out by groups of names\)",
    "all": r"photos, 12 images to train on and 12 to test on \(none is held out",
}
LABELS = [*range(10), 0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with small data of every layout, and the configs."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "configs").symlink_to(ROOT / "configs")
    images, grey = pictures(12, 32, 32), pictures(12, 28, 28, 1)[..., 0]
    for name in ("photos", "imagenet/train"):
        write_tree(folder / name / "ant", images[:6])
        write_tree(folder / name / "bee", images[6:])
    write_tree(folder / "imagenet/val", images[:5])
    scans = [values.astype(np.uint16) * 16 for values in grey[..., None]]
    files = [tiff(v) if i % 2 else png_of_16_bits(v) for i, v in enumerate(scans)]
    for i, content in enumerate(files):
        write_tree(folder / "scans", [content], f"patient{i // 3}_{i}.{('png', 'tif')[i % 2]}")
    write_tree(folder / "counts", [encoded(v[:8, :8]) for v in 2 * grey.astype(np.uint16)])
    write_tree(folder / "edm/00000", images)
    lines = ", ".join(f'["00000/{i:03d}.png", {label}]' for i, label in enumerate(LABELS))
    (folder / "edm/dataset.json").write_text(f'{{"labels": [{lines}]}}')
    write_zip(folder / "cifar10-32x32.zip", folder / "edm", top=False)
    np.save(folder / "images.npy", images)
    np.savez(folder / "images.npz", images=images, labels=LABELS)
    write_tar(folder / "examples.tar", examples(images, LABELS))
    (folder / "shards").mkdir()
    for number in range(3):
        part = slice(4 * number, 4 * number + 4)
        shard = examples(images[part], LABELS[part], 4 * number, "json")
        write_tar(folder / f"shards/set-{number:06d}.tar", shard)
    for split, part in (("train", slice(6)), ("test", slice(6, 12))):
        path = folder / f"hub/data/{split}-00000-of-00001.parquet"
        write_parquet(path, images[part], LABELS[part], NAMES)
    write_tar(folder / "cifar-10-python.tar.gz", cifar_python(images, LABELS))
    write_tar(folder / "cifar-10-binary.tar.gz", cifar_binary(images, LABELS))
    (folder / "mnist").mkdir()
    write_files(folder / "mnist", mnist(grey, np.arange(12) % 4, 4, packed=True))
    section = PAGE.partition("## Latents of an autoencoder")[2]
    (folder / "export.py").write_text(re.search(r"^```python\n(.*?)^```", section, re.M | re.S)[1])
    with contextlib.chdir(folder):
        runpy.run_path("export.py", run_name="__main__")  # it writes autoencoder.pt
    faces = pictures(12, 8, 8)
    (folder / "ffhq-r04.tfrecords").write_bytes(tfrecord(*map(stylegan_example, faces)))
    return folder


def test_every_layout_has_a_command():
    assert [*SAID] == [re.sub(r".*runs/", "", c[c.index("--workdir") + 1]) for c in COMMANDS]
    assert all(command[:2] == ["python3", "main.py"] for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=[*SAID])
def test_commands(folder, command, request):
    workdir = folder / command[command.index("--workdir") + 1]
    if workdir.name == "parquet" and not has_pyarrow():
        pytest.skip("pyarrow is an optional requirement")
    stats = [f"--config.eval.stats_dir={folder}/stats"]
    done = Program([*MAIN, *command[2:], *SMALL, *stats], cwd=folder).finish()
    line = re.search(r"^data: .*$", done.stdout, re.M)[0]
    print(f"| `{workdir.name}` | {line} |")  # the table of a closing note: pytest -rP
    assert re.search(SAID[workdir.name], line)
    if workdir.name == "look":
        assert {path.name for path in workdir.iterdir()} == {"data.html"}
        assert f"page: {workdir.relative_to(folder)}/data.html" in done.stdout
    else:
        assert load_checkpoint(workdir / "checkpoints-meta/checkpoint.pth")["step"] == 20


def test_the_command_for_parquet_without_pyarrow(folder, tmp_path, monkeypatch, caplog):
    """In this process, with a stand-in for pyarrow."""
    caplog.set_level(logging.INFO)
    if not has_pyarrow():
        fake_pyarrow.install(monkeypatch)
    (command,) = (command for command in COMMANDS if "runs/parquet" in command)
    assert command[3] == "configs/pfgmpp/images16_ddpmpp.py"
    assert command[-2:] == ["--config.data.path=hub", "--config.data.num_classes=-1"]
    data = {"data__path": str(folder / "hub"), "data__num_classes": -1, "data__image_size": 8}
    config = tiny(command[3].removeprefix("configs/"), tmp_path, training__n_iters=20, **data)
    assert run_lib.train(config, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run/checkpoints-meta/checkpoint.pth")["step"] == 20
    line = re.search(r"data: .*", caplog.text)[0]
    print(f"| `parquet` | {line} |")
    assert re.search(SAID["parquet"], line)


# --- the page -------------------------------------------------------------------------------------


def look(tmp_path, path, classes=0, **values):
    data = {"data__path": str(path), "data__image_size": 8, "data__num_channels": 0}
    data |= {"data__num_classes": classes, "training__n_iters": 1000} | values
    config = tiny("poisson/images32_ddpmpp.py", tmp_path, **data)
    run_lib.look_at_data(config, tmp_path / "run")
    return (tmp_path / "run/data.html").read_text()


def test_the_page_has_what_there_is_to_know(tmp_path):
    images = np.stack([np.full((8, 8), level, np.uint8) for level in range(0, 240, 10)])
    write_tree(tmp_path / "x/<ant>", images[:8])
    write_tree(tmp_path / "x/bee", images[8:])
    (tmp_path / "x/notes.txt").write_text("")
    page = look(tmp_path, tmp_path / "x", -1)
    text = re.sub(r"<svg.*?</svg>|<style>.*?</style>|data:image[^\"]*", "", page, flags=re.S)
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert re.findall(r"<li title='(.*?)'>", text) == ["&lt;ant&gt;", "bee"]
    ants, bees = grid_of(page).reshape(2, 50, 8, 50, 3)[:, 26, :, 26, 0]
    assert {*ants} <= {*range(0, 80, 10), 128} and {*bees} <= {*range(80, 240, 10), 128}
    assert page.count("<svg") == 2 and page.count("data:image/png;base64,") == 1
    assert "<ant>" not in text and "0 &lt;ant&gt;" in cells
    assert "left out: 1 .txt" in text and "held out by names" in text
    assert re.search(r"a step</dt><dd>[\d.e-]+ s for \d+ images on cpu", text)
    assert re.search(r"1,000 steps</dt><dd>[\d.]+ (seconds|minutes)", text)
    assert re.search(r"memory</dt><dd>[\d.]+ GiB of the whole program", text)
    assert [cells[i + 1] for i, cell in enumerate(cells) if cell == "stored"] == ["0"]
    stored, encoded = (cells.index(name) for name in ("stored", "encoded"))
    low, high = (float(cells[stored + i].replace("−", "-")) for i in (2, 3))
    assert 0 <= low < high <= 230
    low_x, high_x = (float(cells[encoded + i].replace("−", "-")) for i in (2, 3))
    np.testing.assert_allclose((low_x, high_x), np.array((low, high)) / 127.5 - 1, atol=1e-3)
    counts = cells[cells.index("0 &lt;ant&gt;") :]
    train, test = int(counts[1]), int(counts[2])
    assert train + test == 8 and "2 classes of" in text


def grid_of(page):
    """The picture of a page, without the gap at its right and lower edges."""
    content = base64.b64decode(re.search(r"data:image/png;base64,([^\"]*)", page)[1])
    return np.asarray(Image.open(io.BytesIO(content)))[:-2, :-2]


def test_pairs_stand_side_by_side(tmp_path):
    """The conditions are the negatives of the images."""
    images = np.arange(0, 240, 10, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "b.npy", 255 - images)
    pair = {"data__path": str(tmp_path / "a.npy"), "data__condition_path": str(tmp_path / "b.npy")}
    config = tiny("pfgmpp/denoise_ddpmpp.py", tmp_path, **pair, data__image_size=8)
    run_lib.look_at_data(config, tmp_path / "run")
    page = (tmp_path / "run/data.html").read_text()
    cells = grid_of(page).astype(int)[26::50]
    left, right = cells[:, 26::98, 0], cells[:, 74::98, 0]
    images = left != 128
    assert images.sum() == 22 and (left + right)[images].tolist() == [255] * 22
    assert "each with its condition on its right" in page
    assert "<td>condition</td>" in page


def test_a_look_changes_no_run(tmp_path):
    write_tree(tmp_path / "x", pictures(12))
    look(tmp_path, tmp_path / "x")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"data.html"}
    config = tiny("vp/digits_ddpmpp.py", tmp_path)
    run_lib.look_at_data(config, tmp_path / "other", tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()
    assert run_lib.train(config, tmp_path / "other")
    before = (tmp_path / "other/checkpoints-meta/checkpoint.pth").read_bytes()
    run_lib.look_at_data(config, tmp_path / "other", tmp_path / "out")
    assert (tmp_path / "out/data.html").exists() and not (tmp_path / "other/data.html").exists()
    assert (tmp_path / "other/checkpoints-meta/checkpoint.pth").read_bytes() == before


def test_the_cost_of_a_step_is_on_the_line_through_smaller_ones(monkeypatch):
    """Of 96 examples in two micro-batches, where a step takes 0.1 s and 0.01 s an example."""
    numbers = []

    def measured_step(state, batch, prepare, generator, parts):
        numbers.append(96 // parts)
        return 0.1 + 0.01 * numbers[-1], 1000 + 8 * numbers[-1], 8 * numbers[-1]

    monkeypatch.setattr(step_cost, "_measured_step", measured_step)
    state = SimpleNamespace(
        objective=SimpleNamespace(examples=96),
        accumulate=2,
        schedule={"n_iters": 1000},
        parameters=[torch.zeros(1)],
    )
    for enough, most in ((0.2, 12), (10.0, 48)):
        monkeypatch.setattr(step_cost, "ENOUGH", enough)
        cost = step_cost.estimate(state, range(500), None, None)
        assert numbers[-1] == most and state.accumulate == 2
        assert cost.seconds == pytest.approx(0.1 + 0.01 * 96)
        assert cost.memory == 1000 + 8 * 48
    words = "estimated: a step 1.06 s for 96 images on cpu, 1,000 steps 18 minutes, memory "
    assert cost.line.startswith(words)


def test_bytes_kept_for_backward_count_each_storage_once_and_no_weights():
    weight = torch.nn.Parameter(torch.rand(5, 7))
    x = torch.rand(3, 5)
    with step_cost._kept_bytes([weight]) as kept:
        y = (x @ weight).exp()  # keeps x and its own result
        (y * y).sum()
    assert sum(kept.values()) == 4 * (3 * 5 + 3 * 7)


# --- names of Hugging Face ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["load_dataset", "Dataset", "load_from_disk"])
def test_names_of_hugging_face_lead_to_the_page(tmp_path, name):
    (tmp_path / "mine.py").write_text(
        f"from configs.vp.digits_ddpmpp import get_config\nfrom datasets import {name}\n"
    )
    arguments = ["--config", str(tmp_path / "mine.py"), "--mode", "train"]
    done = run_main([*arguments, "--workdir", str(tmp_path / "run")], expect=2)
    assert re.fullmatch(
        rf"error: config file .*mine\.py.*: `datasets` is a module of this project, .*has {name}: "
        r"save the data as parquet files elsewhere; see docs/data\.md\n",
        done.stderr,
    )


def test_other_names_of_the_module_are_unknown():
    import datasets

    assert not hasattr(datasets, "nothing") and hasattr(datasets, "get_dataset")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from datasets import nothing  # noqa: F401
