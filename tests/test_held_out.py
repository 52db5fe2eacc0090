"""Images held out by share, by number, by groups of names, or not; test splits without labels."""

import hashlib
import json
import logging
import shutil

import fake_pyarrow
import numpy as np
import pytest
import torch
from data_files import write_tree, write_zip
from hypothesis import given
from hypothesis import strategies as st
from own_files import examples, has_pyarrow, write_parquet, write_tar
from test_identity import grey
from test_labels import folder_config
from test_small_runs import report_of, tiny
from test_sources import config_of

import datasets
import run_lib
from configs.default import check
from configs.schema import ShareOrCount
from reports.table import report_table
from sources import splits
from storage import run_config as stored_config
from storage.checkpoints import load_checkpoint, save_checkpoint
from storage.run_config import flatten


def fraction(name):
    """The hash of a name, by the definition."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16


NAMES = [f"p{number % 7}/scan_{number:03d}.png" for number in range(200)]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.9])
def test_a_share_of_the_names(share):
    test = {NAMES[i] for i in splits.held_out_by_name(NAMES, "test", share)}
    assert test == {name for name in NAMES if fraction(name) < share}
    train = {NAMES[i] for i in splits.held_out_by_name(NAMES, "train", share)}
    assert (train | test, train & test) == ({*NAMES}, set())


@pytest.mark.parametrize("number", [1, 17, 199])
def test_so_many_names_with_the_smallest_hashes(number):
    test = [NAMES[i] for i in splits.held_out_by_name(NAMES, "test", number)]
    assert sorted(test, key=fraction) == sorted(NAMES, key=fraction)[:number]
    assert len(splits.held_out_by_name(NAMES, "train", number)) == 200 - number


def test_an_added_name_displaces_at_most_one():
    before = {NAMES[i] for i in splits.held_out_by_name(NAMES, "test", 10)}
    for k in range(50):
        names = [*NAMES, f"new{k}.png"]
        now = {names[i] for i in splits.held_out_by_name(names, "test", 10)}
        assert len(now) == 10 and len(before - now) == (f"new{k}.png" in now)


@pytest.mark.parametrize("amount", [0.3, 40.0, 1])
@pytest.mark.parametrize(
    "pattern, group", [(r"^p\d", lambda n: n[:2]), (r"p(\d)/", lambda n: n[1])]
)
def test_groups_are_held_out_together(amount, pattern, group):
    test = [NAMES[i] for i in splits.held_out_by_name(NAMES, "test", amount, pattern)]
    train = [NAMES[i] for i in splits.held_out_by_name(NAMES, "train", amount, pattern)]
    assert not {*map(group, test)} & {*map(group, train)}
    assert sorted(test + train) == sorted(NAMES)
    order = sorted({*map(group, NAMES)}, key=fraction)
    if amount >= 1:  # a number: whole groups, until they hold as many images
        sizes = np.cumsum([sum(group(name) == each for name in NAMES) for each in order])
        assert len(test) == sizes[np.searchsorted(sizes, amount)]
    else:
        expected = {each for each in order if fraction(each) < amount} or {order[0]}
        assert {*map(group, test)} == expected


def test_names_without_a_match_are_groups_of_their_own():
    names = [*NAMES, "q.png", "r.png"]
    test = {names[i] for i in splits.held_out_by_name(names, "test", 0.5, r"p(\d)/")}
    assert {"q.png", "r.png"} & test == {n for n in ("q.png", "r.png") if fraction(n) < 0.5}


@given(st.integers(2, 300), st.one_of(st.floats(1e-6, 0.999), st.integers(1, 299)))
def test_arrays_are_split_at_random(n, amount):
    if amount >= n:
        with pytest.raises(ValueError, match=f"leaves none of {n} images to train on"):
            splits.held_out(n, "test", amount)
        return
    train, test = (splits.held_out(n, split, amount).tolist() for split in ("train", "test"))
    assert sorted(train + test) == [*range(n)]
    assert len(test) == (amount if amount >= 1 else min(max(1, round(n * amount)), n - 1))


def test_the_tenth_is_that_of_before():
    for n in [*range(2, 500), 10**6 + 5, 60_000]:
        order, tenth = np.random.RandomState(0).permutation(n), max(1, round(n / 10))
        assert splits.held_out(n, "test").tolist() == order[:tenth].tolist()
        assert splits.held_out(n, "train").tolist() == order[tenth:].tolist()


def test_all_may_be_in_one_group_only_where_none_is_held_out():
    with pytest.raises(ValueError, match="puts all 200 images into one group"):
        splits.held_out_by_name(NAMES, "test", 0.1, "p")
    assert len(splits.held_out_by_name(NAMES, "test", 0, "p")) == 200
    with pytest.raises(ValueError, match=r"1 image\(s\) cannot be split .*data.held_out=0"):
        splits.held_out_by_name(["a"], "test")
    assert len(splits.held_out(1, "train", 0)) == 1


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf"), True, "0.1", None])
def test_what_is_neither_share_nor_number_is_refused(value):
    assert not ShareOrCount().accepts(value)


def test_a_share_of_more_than_all_is_one_line():
    config = config_of("folder")
    config.data.held_out = 1.5
    words = "data.held_out must be a number from 0 to below 1, or a whole number, not 1.5"
    with pytest.raises(ValueError, match=words):
        check(config)


@pytest.mark.parametrize("value", ["(", "*", "a\nb", "x" * 1001])
def test_groups_are_a_regular_expression(value):
    config = config_of("folder")
    config.data.groups = value
    with pytest.raises(ValueError, match="data.groups must be a regular expression"):
        check(config)


# --- every layout ---------------------------------------------------------------------------------


def make(kind, path):
    """Write 40 images, each of a different grey, in a layout; return its path."""
    images = np.stack([np.full((4, 4, 1), number, np.uint8) for number in range(40)])
    if kind in ("folder", "zip"):
        write_tree(path / "x", images[..., 0], "p{i:02d}.png")
        if kind == "zip":
            write_zip(path / "x.zip", path / "x", top=False)
    elif kind == "tar":
        write_tar(path / "x.tar", examples(images, range(40)))
    elif kind == "parquet":
        write_parquet(path / "x.parquet", images, range(40))
    elif kind == "npy":
        np.save(path / "x.npy", images)
    else:
        np.savez(path / "x.npz", images=images)
    return path / ("x" if kind == "folder" else f"x.{kind}")


@pytest.fixture(autouse=True)
def arrow(monkeypatch):
    if not has_pyarrow():
        fake_pyarrow.install(monkeypatch)


def greys(path, split, **data):
    config = folder_config(path, 0, **data)
    images = datasets.get_dataset(config, split)
    return sorted(images[: len(images)][:, 0, 0, 0].tolist())


LAYOUTS = ("folder", "zip", "tar", "parquet", "npy", "npz")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_holds_out_what_is_asked_for(tmp_path, kind):
    path = make(kind, tmp_path)
    for amount, number in ((0, 40), (7, 7), (0.5, None)):
        train, test = (greys(path, split, held_out=amount) for split in datasets.SPLITS)
        if not amount:
            assert train == test == [*range(40)]
            continue
        assert sorted(train + test) == [*range(40)]
        assert len(test) == number if number else 8 < len(test) < 32


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_line_of_the_log_says_what_is_held_out(tmp_path, kind):
    path = make(kind, tmp_path)
    by_name = kind not in ("npy", "npz")

    def words(**data):
        return datasets.Data(folder_config(path, 0, **data).data).split_words

    assert words() == ("a tenth is held out by names" if by_name else "a random tenth is held out")
    assert (
        words(held_out=0.25)
        == f"a share of 0.25 is held out {'by names' if by_name else 'at random'}"
    )
    assert words(held_out=7) == f"7 are held out {'by names' if by_name else 'at random'}"
    assert words(held_out=0) == splits.NONE_HELD_OUT
    if by_name:
        assert words(groups="p") == "a tenth is held out by groups of names"
    else:
        with pytest.raises(ValueError, match="data.groups='p' needs names of files"):
            greys(path, "test", groups="p")


def test_splits_that_the_data_have_stay(tmp_path):
    write_tree(tmp_path / "train", grey(1))
    write_tree(tmp_path / "test", grey(2))
    assert greys(tmp_path, "train", held_out=0) == [1] * 10
    assert greys(tmp_path, "test", held_out=0) == [2] * 10


def test_a_zip_of_edm_trains_on_all_its_images(tmp_path):
    """The zip is that of EDM's dataset_tool.py: numbered folders, and dataset.json."""
    for number in range(30):
        write_tree(tmp_path / f"set/0000{number % 3}", grey(number, 1), f"img{number:08d}.png")
    lines = [[f"0000{n % 3}/img{n:08d}.png", n % 5] for n in range(30)]
    (tmp_path / "set/dataset.json").write_text(json.dumps({"labels": lines}))
    write_zip(tmp_path / "set.zip", tmp_path / "set", top=False)
    config = folder_config(tmp_path / "set.zip", held_out=0)
    for split in datasets.SPLITS:
        data = datasets.get_dataset(config, split)
        assert sorted(data.images[:, 0, 0, 0].tolist()) == [*range(30)]
        assert data.labels.tolist() == [int(grey) % 5 for grey in data.images[:, 0, 0, 0]]


def test_digits_hold_out_what_is_asked_for():
    config = config_of("digits", 8, 1)
    assert len(datasets.get_dataset(config, "test")) == 180
    config.data.held_out = 0
    assert torch.equal(*(datasets.get_dataset(config, split) for split in datasets.SPLITS))
    data = datasets.Data(config.data)
    assert data.split_words == splits.NONE_HELD_OUT and "data.held_out=0" in data.remark("test")
    assert data.remark("train") == ""


# --- runs -----------------------------------------------------------------------------------------


def run_config(path, tmp_path, **values):
    data = {"data__path": str(path), "data__image_size": 4, "data__num_channels": 1}
    values = {"data__num_classes": 0, "eval__enable_sampling": False} | values
    return tiny("vp/images32_ddpmpp.py", tmp_path, **data, **values)


def test_a_run_without_held_out_images_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = make("folder", tmp_path)
    config = run_config(path, tmp_path, data__held_out=0.0, eval__enable_loss=True)
    assert run_lib.train(config, tmp_path / "run")
    message = (
        "40 images to train on and 40 to test on (none is held out, the test split is the training"
    )
    assert message in caplog.text
    run_lib.evaluate(config, tmp_path / "run")
    report = report_of(tmp_path / "run", config.eval.end_ckpt)
    remark = "of the training images, as none are held out (data.held_out=0)"
    assert str(report["loss_remark"]) == remark
    assert remark in report_table(report, "test", "")
    assert remark in (tmp_path / "run/eval/report.html").read_text()


def test_a_run_keeps_what_it_holds_out(tmp_path):
    path = make("folder", tmp_path)
    config = run_config(path, tmp_path, data__held_out=5.0)
    assert run_lib.train(config, tmp_path / "run")
    assert flatten(config)["data.held_out"] == 5
    config.data.held_out = 6.0
    config.training.n_iters = 3
    with pytest.raises(
        datasets.DataChanged, match="35 to train and 5 to test on then, 34 to train"
    ):
        run_lib.train(config, tmp_path / "run")


def test_a_run_that_began_before_the_keys_keeps_its_split(tmp_path):
    path = make("folder", tmp_path)
    config = run_config(path, tmp_path)
    assert run_lib.train(config, tmp_path / "run")
    checkpoints = [*(tmp_path / "run").glob("checkpoints*/*.pth")]
    for checkpoint in checkpoints:
        content = load_checkpoint(checkpoint)
        del content["config"]["data.held_out"], content["config"]["data.groups"]
        save_checkpoint(checkpoint, content)
    assert stored_config.load(tmp_path / "run").data.held_out == splits.SHARE
    config.training.n_iters = 3
    assert run_lib.train(config, tmp_path / "run")  # training refuses a run whose data changed


# --- test splits without labels -------------------------------------------------------------------


def without_labels(kind, root):
    """ImageNet's layout: a folder for each class of train/, and a flat val/; or arrays like it."""
    if kind == "npz":
        arrays = {"x_train": np.repeat(np.array([10, 20], np.uint8), 10), "x_test": np.full(6, 30)}
        images = {
            name: np.broadcast_to(v.astype(np.uint8)[:, None, None], (len(v), 4, 4))
            for name, v in arrays.items()
        }
        np.savez(root / "x.npz", **images, y_train=np.repeat([0, 1], 10))
        return root / "x.npz"
    for name, level in (("ant", 10), ("bee", 20)):
        write_tree(root / "x/train" / name, grey(level))
    write_tree(root / "x/val", grey(30, 6))
    if kind == "zip":
        write_zip(root / "x.zip", root / "x")
        return root / "x.zip"
    return root / "x"


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_a_test_split_without_labels_trains(tmp_path, kind, caplog):
    caplog.set_level(logging.INFO)
    path = without_labels(kind, tmp_path)
    config = run_config(path, tmp_path, data__num_classes=-1, eval__enable_loss=True)
    assert run_lib.train(config, tmp_path / "run")
    assert "; the test split has no class labels" in caplog.text
    run_lib.evaluate(config, tmp_path / "run")
    report = report_of(tmp_path / "run", config.eval.end_ckpt)
    assert str(report["loss_remark"]) == "without class labels, which the test split does not have"
    config.eval.enable_classification = True
    with pytest.raises(ValueError, match="needs class labels, and the test split has none"):
        run_lib.evaluate(config, tmp_path / "run", "other")
    config.eval.dataset = "train"
    run_lib.evaluate(config, tmp_path / "run", "other")
    assert "loss_remark" not in report_of(tmp_path / "run", config.eval.end_ckpt, "other")


def test_labels_of_a_split_that_has_none(tmp_path):
    config = folder_config(without_labels("folder", tmp_path))
    test = datasets.get_dataset(config, "test")
    assert test.labels.tolist() == [-1] * 6
    data = datasets.Data(config.data)
    assert data.identity.classes == ("ant", "bee")
    assert not data.has_labels("test") and data.has_labels("train")
    assert data.labels("test").tolist() == []


def test_a_test_split_with_labels_for_some_is_refused(tmp_path):
    path = without_labels("folder", tmp_path)
    write_tree(path / "val/ant", grey(10, 1))
    with pytest.raises(
        ValueError, match="6 of 27 images of .* have no class label, such as val/000"
    ):
        datasets.get_dataset(folder_config(path), "train")
    shutil.rmtree(path / "train/ant")
    write_tree(path / "train", grey(10, 1))
    shutil.rmtree(path / "val/ant")
    with pytest.raises(ValueError, match="1 of 11 images"):
        datasets.get_dataset(folder_config(path), "train")
