"""Files that count as data in a folder or zip, their splits, and remarks on the rest."""

import hashlib
import os
import re
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import encoded, pictures, write_tree, write_zip
from hypothesis import given
from hypothesis import strategies as st
from test_small_runs import tiny
from test_sources import config_of

import datasets
import run_lib
from completion import complete
from configs.keys import flatten
from sources import folder, labels, listing, rules, splits
from sources.images import read_header
from storage import run_config
from storage.checkpoints import load_checkpoint, save_checkpoint

IMAGE = encoded(pictures(1)[0])


def place(root, *paths):
    """Empty files at `paths`, or an image where the name is that of a PNG."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(IMAGE if path.lower().endswith(".png") else b"")


def both_listings(root):
    """The names of the images in a folder and in a zip of it, and what is left out; both equal."""
    write_zip(root.with_suffix(".zip"), root, top=False)
    with zipfile.ZipFile(root.with_suffix(".zip")) as archive:
        packed = listing.list_zip(archive.namelist())
    plain = listing.list_folder(root)
    assert packed.files == plain.files
    assert listing.in_words(packed.omitted) == listing.in_words(plain.omitted)
    return [*plain.files], listing.in_words(plain.omitted)


@pytest.mark.parametrize(
    "path, words",
    [
        (".ipynb_checkpoints/a.png", "1 hidden folder (.ipynb_checkpoints)"),
        ("cats/.Trash/deep/a.png", "1 hidden folder (.Trash)"),
        (".git/objects/00/a.png", "1 hidden folder (.git)"),
        ("@eaDir/a.png", "1 folder of the system (@eaDir)"),
        ("__MACOSX/cats/a.png", "1 folder of the system (__MACOSX)"),
        ("cats/$RECYCLE.BIN/a.png", "1 folder of the system ($RECYCLE.BIN)"),
        ("Thumbs.db", "1 .db"),
        ("cats/._1.png", "1 hidden file"),
        ("cats/readme", "1 file without a suffix"),
        ("cats/1.HEIC", "1 .heic"),
        ("grid.png", "1 picture of this program (grid.png)"),
        ("cats/film.webp", "1 picture of this program (film.webp)"),
        ("cats/encoded.png", "1 picture of this program (encoded.png)"),
        ("cats/ode_images_3.png", "1 picture of this program (ode_images_3.png)"),
    ],
)
def test_what_is_no_image_is_left_out_and_said(tmp_path, path, words):
    place(tmp_path / "x", "0.png", "cats/1.png", path)
    assert both_listings(tmp_path / "x") == (["0.png", "cats/1.png"], words)
    config = config_of("folder", path=str(tmp_path / "x"))
    assert folder.find(config.data).omitted == words
    data = [datasets.get_dataset(config, split) for split in datasets.SPLITS]
    assert datasets.Data(config.data).describe(*data).endswith(f"; left out: {words}")


def test_kinds_are_counted(tmp_path):
    place(tmp_path / "x", "0.png", *(f"{i}.txt" for i in range(30)), *(f"{i}.csv" for i in "ab"))
    place(tmp_path / "x", ".b/1.png", "c/.a/2.png", ".b/c/3.png")
    names, words = both_listings(tmp_path / "x")
    assert names == ["0.png"]
    assert words == "30 .txt, 2 .csv, 2 hidden folders (.a, .b)"


def test_many_kinds_are_one_line():
    listed = listing.list_zip(["0.png", *(f"a.{i:03d}\n" for i in range(99)), "\x1b/.b\n/1.png"])
    words = listing.in_words(listed.omitted)
    assert words == "99 files without a suffix, 1 hidden folder (.b?)"
    listed = listing.list_zip(["0.png", *(f"a.{i:03d}" for i in range(99))])
    words = listing.in_words(listed.omitted)
    assert words.startswith("1 .000, 1 .001, ")
    assert words.endswith(", 1 .011, 87 of other kinds")


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "tif", "tiff", "gif"]
)
def test_formats_that_are_taken(tmp_path, suffix):
    place(tmp_path / "x", f"a/1.{suffix}", f"a/2.{suffix.upper()}")
    assert both_listings(tmp_path / "x") == ([f"a/1.{suffix}", f"a/2.{suffix.upper()}"], "")


def test_a_picture_of_ours_needs_company():
    """Images of a user may all be called sample.png, each in a folder of its own."""
    assert [*listing.list_zip(["1/sample.png", "2/sample.png"]).files] == [
        "1/sample.png",
        "2/sample.png",
    ]
    assert not listing.list_zip(["1/sample.png", "1/sample.npz"]).files
    assert not listing.list_zip(["eval/nearest_2.png", "eval/report_2.npz"]).files


RUN = ("config.json", "checkpoints/checkpoint_5.pth", "samples/step_5/000000.png", "eval/a.png")


@pytest.mark.parametrize("where", ["run", "cats/a run", "runs/1"])
def test_a_workdir_in_the_data_is_no_data(tmp_path, where):
    place(tmp_path / "x", "0.png", "cats/1.png", *(f"{where}/{path}" for path in RUN))
    names, words = both_listings(tmp_path / "x")
    assert names == ["0.png", "cats/1.png"]
    assert words == f"1 run of this program ({where})"


def test_a_workdir_that_is_the_folder_of_its_data(tmp_path):
    place(tmp_path / "x", "0.png", "cats/1.png", *RUN[:3])
    names, words = both_listings(tmp_path / "x")
    assert names == ["0.png", "cats/1.png"]
    assert words == "2 folders of a run of this program (checkpoints, samples), 1 .json"


def test_samples_are_images_and_their_grid_is_none(tmp_path):
    place(tmp_path / "x", "settings.json", "grid.png", "samples.npz", "000000.png", "000001.png")
    assert both_listings(tmp_path / "x")[0] == ["000000.png", "000001.png"]


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    place(tmp_path, *(f"runs/a/{path}" for path in RUN), "notes.txt")
    with pytest.raises(ValueError, match=r"no images .*; left out: 1 \.txt, 1 run .*\(runs/a\)$"):
        datasets.get_dataset(config_of("folder", path=str(tmp_path)), "train")


def test_a_start_lists_a_folder_once_and_reads_each_header_once(tmp_path, monkeypatch):
    write_tree(tmp_path / "x", pictures(30, 6, 8))
    config = config_of("folder", channels=0, path=str(tmp_path / "x"))
    scandir, folders, headers = os.scandir, [], []
    monkeypatch.setattr(os, "scandir", lambda path: folders.append(Path(path)) or scandir(path))

    def read(file):
        headers.append(Path(file.name).name)
        return read_header(file)

    monkeypatch.setattr("sources.files.read_header", read)
    data = datasets.Data(config.data)
    config.data.scale, _ = data.measure_scale()
    config.data.num_channels = data.measure_channels()
    identity, train, test = data.identity_of_run(), data.get("train"), data.get("test")
    assert (identity.train, identity.test) == (len(train), len(test))
    assert "cut to the central square" in data.describe(train, test)
    assert folders == [tmp_path / "x"]
    assert sorted(headers) == [f"{i:03d}.png" for i in range(30)]
    data.close()
    assert data.get("train").shape == train.shape
    assert folders == 2 * [tmp_path / "x"]  # what was closed is read again


# --- links ----------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_once(tmp_path):
    place(tmp_path, "far/1.png", "far/deep/2.png", "x/real/3.png")
    for name, target in (("a", "far"), ("b", "far"), ("0", "x/real"), ("loop", "x")):
        (tmp_path / "x" / name).symlink_to(tmp_path / target)
    (tmp_path / "far/back").symlink_to(tmp_path / "x")
    (tmp_path / "far/deep/up").symlink_to("..")
    listed = listing.list_folder(tmp_path / "x")
    assert [*listed.files] == ["a/1.png", "a/deep/2.png", "real/3.png"]
    assert listing.in_words(listed.omitted) == (
        "5 further links to a folder that is read (0, a/back, a/deep/up, ...)"
    )


@pytest.mark.parametrize("target", ["nowhere", "x/me.png", "/nowhere/at/all"])
def test_broken_links_are_counted(tmp_path, target):
    place(tmp_path, "x/0.png", "x/1.png")
    (tmp_path / "x/me.png").symlink_to(tmp_path / target)
    listed = listing.list_folder(tmp_path / "x")
    assert [*listed.files] == ["0.png", "1.png"]
    assert listing.in_words(listed.omitted) == "1 broken link"


def test_links_to_files_are_followed(tmp_path):
    place(tmp_path, "far.png", "x/0.png")
    (tmp_path / "x/1.png").symlink_to(tmp_path / "far.png")
    os.mkfifo(tmp_path / "x/2.png")
    listed = listing.list_folder(tmp_path / "x")
    assert [*listed.files] == ["0.png", "1.png"]
    assert listing.in_words(listed.omitted) == "1 pipe or device"


def test_links_into_a_hidden_folder_are_followed(tmp_path):
    place(tmp_path, "x/.store/cats/1.png")
    (tmp_path / "x/cats").symlink_to(".store/cats")
    assert [*listing.list_folder(tmp_path / "x").files] == ["cats/1.png"]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored, name",
    [
        ("train\\cats\\1.png", "train/cats/1.png"),
        ("./train//1.png", "train/1.png"),
        ("..\\..\\evil.png", "../../evil.png"),
        (unicodedata.normalize("NFD", "é/ü.png"), "é/ü.png"),
    ],
)
def test_names_of_entries(stored, name):
    listed = listing.list_zip([stored, "a\\", "b/"])
    assert listed.files == {name: stored}
    assert not listed.omitted


def test_entries_of_one_name_are_said():
    listed = listing.list_zip(["a/1.png", "a\\1.png", "a/1.png", "2.png"])
    assert listed.files == {"2.png": "2.png", "a/1.png": "a/1.png"}
    assert listing.in_words(listed.omitted) == "2 files of a name that another has"


def test_backslashes_are_separators(tmp_path):
    """Backslashes separate folders in entries of a zip and in the names of dataset.json."""
    images = pictures(6, 8, 8, 1)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for i, image in enumerate(images):
            file.writestr(f"{'test' if i < 2 else 'train'}\\{i}.png", encoded(image[..., 0]))
        lines = ", ".join(f'["{"test" if i < 2 else "train"}\\\\{i}.png", {i}]' for i in range(6))
        file.writestr("dataset.json", f'{{"labels": [{lines}]}}')
    config = config_of("folder", channels=1, path=str(tmp_path / "x.zip"), num_classes=6)
    for split, part in (("test", slice(2)), ("train", slice(2, 6))):
        data = datasets.get_dataset(config, split)
        assert (data.images.permute(0, 2, 3, 1).numpy() == images[part]).all()
        assert data.labels.tolist() == [*range(6)][part]


def test_entries_in_30000_folders_are_read():
    names = [f"{'a/' * 30_000}{i}.png" for i in range(20)]
    assert len(listing.list_zip([*names, "config.json", "checkpoints/1.pth"]).files) == 20


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, expected",
    [
        (["train", "test"], ("train", "test")),
        (["Training", "Testing"], ("Training", "Testing")),
        (["train_images", "test_images"], ("train_images", "test_images")),
        (["trainset", "devset"], ("trainset", "devset")),
        (["train2017", "val2017"], ("train2017", "val2017")),
        (["images-train", "Held Out"], ("images-train", "Held Out")),
        (["train", "training", "valid", "eval", "Test Data", "test"], ("train", "test")),
        (["train", "eval", "dev", "val"], ("train", "val")),
        (["train", "development", "holdout"], ("train", "development")),
        (["train", "other"], None),
        (["test", "val"], None),
        (["trains", "testament"], None),
    ],
)
def test_names_of_splits(names, expected):
    expected = dict(zip(("train", "test"), expected, strict=True)) if expected else {}
    assert splits.find_splits(names) == splits.find_splits(names[::-1]) == expected


@pytest.mark.parametrize("packed", [False, True])
def test_images_beside_the_splits_are_said(tmp_path, packed):
    for name, number in (("Train", 4), ("TEST", 2), ("val", 3), ("extra", 5)):
        write_tree(tmp_path / "x" / name, pictures(number))
    place(tmp_path, "x/top.png")
    write_zip(tmp_path / "x.zip", tmp_path / "x")
    config = config_of("folder", path=str(tmp_path / ("x.zip" if packed else "x")))
    assert [len(datasets.get_dataset(config, split)) for split in datasets.SPLITS] == [4, 2]
    assert folder.find(config.data).omitted == "9 images beside Train and TEST (extra, val)"


def test_arrays_beside_the_splits_are_said(tmp_path):
    arrays = {"train_images": pictures(4), "val_images": pictures(3), "test_images": pictures(2)}
    arrays |= {"train_labels": np.arange(4), "test_labels": np.arange(2)}
    np.savez(tmp_path / "x.npz", **arrays)
    config = config_of("folder", path=str(tmp_path / "x.npz"), num_classes=-1)
    data = [datasets.get_dataset(config, split) for split in datasets.SPLITS]
    assert [part.labels.tolist() for part in data] == [[0, 1, 2, 3], [0, 1]]
    assert (
        folder.find(config.data).omitted
        == "1 array beside train_images and test_images (val_images)"
    )


NAMES = st.sets(st.text("abcé/\\. ", min_size=1, max_size=6), min_size=2, max_size=60)


def shares(names):
    """The hash of each name as a fraction, by the definition."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest()[:16] for name in names}
    return {name: int(digest, 16) / 16**16 for name, digest in digests.items()}


@given(NAMES, NAMES)
def test_added_files_move_no_other(names, added):
    def held_out(names):
        return {names[i] for i in splits.held_out_by_name(names, "test")}

    names, more = sorted(names), sorted(names | added)
    decided = {name for name, share in shares(names).items() if share < 0.1}
    test = held_out(names)
    smallest, largest = (f(shares(names), key=shares(names).get) for f in (min, max))
    assert test == (decided or {smallest}) - ({largest} if len(decided) == len(names) else set())
    if 0 < len(decided) < len(names):
        assert held_out(more) & set(names) == test
    train = {names[i] for i in splits.held_out_by_name(names, "train")}
    assert (train | test, train & test) == (set(names), set())
    assert train and test


def test_about_a_tenth_is_held_out():
    assert 900 < len(splits.held_out_by_name([f"{i}.png" for i in range(10_000)], "test")) < 1100


def test_files_added_to_a_folder_move_no_other(tmp_path):
    def split():
        parts = [folder.open_folder(config.data, name) for name in datasets.SPLITS]
        return [{part.source.names[i] for i in part.index} for part in parts]

    place(tmp_path, *(f"{i % 7}/{i}.png" for i in range(60)))
    config = config_of("folder", path=str(tmp_path))
    train, test = split()
    assert test == {name for name, share in shares(train | test).items() if share < 0.1}
    place(tmp_path, *(f"{i % 7}/0{i}.png" for i in range(60)), *(f"8/{i}.png" for i in range(60)))
    more_train, more_test = split()
    assert train < more_train
    assert test < more_test


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["0", "1", "2", "9", "10", "11", "100"],
        ["class 1", "class 2", "class 10"],
        ["2", "10", "a", "a2", "a10", "b"],
        ["01", "1", "1a", "002", "3"],
    ],
)
def test_numbers_in_the_names_of_classes_are_numbers(names):
    backwards = list(reversed(names))
    assert sorted(backwards, key=labels.natural) == names


def test_class_2_is_the_folder_2(tmp_path):
    place(tmp_path, *(f"{name}/{i}.png" for name in range(12) for i in range(4)))
    config = config_of("folder", path=str(tmp_path), num_classes=-1)
    assert datasets.get_dataset(config, "train").names == tuple(map(str, range(12)))
    config.data.rules = 1
    assert datasets.get_dataset(config, "train").names[:4] == ("0", "1", "10", "11")


@pytest.mark.parametrize("paths", [["cat/{}.png"], ["x/train/cat/{}.png", "x/test/cat/{}.png"]])
def test_one_folder_is_one_class(tmp_path, paths):
    place(tmp_path, *(path.format(i) for path in paths for i in range(9)))
    config = config_of("folder", path=str(tmp_path), num_classes=-1)
    assert datasets.Data(config.data).measure_classes() == 1
    assert datasets.get_dataset(config, "train").names == ("cat",)


def test_an_image_beside_the_folders_of_classes_has_none(tmp_path):
    place(tmp_path, "set/cat/1.png", "set/dog/2.png", "set/3.png")
    config = config_of("folder", path=str(tmp_path), num_classes=-1)
    with pytest.raises(ValueError, match="1 of 3 images .* such as set/3.png"):
        datasets.get_dataset(config, "train")


# --- images to restore or to encode ---------------------------------------------------------------


def test_images_of_a_folder_follow_the_same_rules(tmp_path, caplog):
    caplog.set_level("INFO")
    place(tmp_path, "far/1.png", "x/2.png", "x/.git/3.png", "x/grid.png", "x/notes.txt")
    (tmp_path / "x/link").symlink_to(tmp_path / "far")
    images = folder.read_images("sampling.encode", str(tmp_path / "x"), 3)
    assert [*images] == ["2.png", "link/1.png"]
    assert "left out: 1 .txt, 1 hidden folder (.git), 1 picture of this program" in caplog.text
    assert [*folder.read_images("sampling.encode", str(tmp_path / "x/grid.png"), 3)] == ["grid.png"]


# --- runs that began before -----------------------------------------------------------------------


def old_folder(root):
    """A folder that both rules read differently."""
    place(root, *(f"data/{i % 11}/{i}.png" for i in range(30)), "data/.hidden/a.png", "far/1.png")
    place(root, "data/grid.png", "data/1.bmp")
    (root / "data/link").symlink_to(root / "far")
    return root / "data"


def test_the_rules_of_before(tmp_path):
    path = old_folder(tmp_path)
    config = config_of("folder", path=str(path), rules=1)
    part = folder.open_folder(config.data, "test")
    names = sorted(
        p.relative_to(path).as_posix() for p in path.rglob("*.png") if "link" not in p.parts
    )
    assert part.source.names == names
    tenth = np.random.RandomState(0).permutation(len(names))[: round(len(names) / 10)]
    assert part.index.tolist() == tenth.tolist()
    assert folder.find(config.data).omitted == "1 .bmp, 1 link to folders (link)"
    assert rules.RULES[1].find_splits(["train", "testing"]) == {}
    for version in (0, 2):
        config.data.rules = version
        assert folder.open_folder(config.data, "test").source.names != names


def forget_rules(path):
    """Makes a checkpoint what it was before there were rules, and runs knew their data."""
    content = load_checkpoint(path)
    del content["config"]["data.rules"], content["data"]
    save_checkpoint(path, content)


@pytest.mark.slow
def test_a_run_keeps_the_rules_that_it_began_with(tmp_path, caplog):
    caplog.set_level("INFO")
    for i in range(30):
        place(tmp_path, f"data/{i}.png")
    place(tmp_path, "data/.hidden/a.png")
    values = {"data__path": str(tmp_path / "data"), "training__precision": "fp32"}
    config = tiny("pfgmpp/images16_ddpmpp.py", tmp_path, **values)
    workdir = tmp_path / "run"
    run_lib.train(config, workdir)
    assert run_config.load(workdir).data.rules == 2
    assert "left out: 1 hidden folder (.hidden)" in caplog.text
    for path in workdir.glob("checkpoints*/*.pth"):
        forget_rules(path)
    completed, _, lines = complete(config, workdir)
    assert completed.data.rules == 1
    assert "data.rules=1: the run began before" in lines[-1]
    config.training.n_iters = 4
    caplog.clear()
    run_lib.train(config, workdir)
    assert run_config.load(workdir).data.rules == 1
    assert "data.rules=1: the run began before" in caplog.text
    assert not re.search("config differs.*data.rules", caplog.text)
    stored, _, lines = complete(run_config.load(workdir), workdir)  # what --mode eval does
    assert stored.data.rules == 1
    assert "data.rules=1" in lines[-1]
    assert complete(config, tmp_path / "new")[0].data.rules == 2


def test_other_data_have_one_kind_of_rules(tmp_path):
    config = tiny("vp/digits_ddpmpp.py", tmp_path)
    completed, _, lines = complete(config, tmp_path)
    assert (completed.data.rules, lines) == (1, [])
    assert flatten(run_config.restore({}))["data.rules"] == 1  # an older run differs in nothing
    assert torch.equal(
        datasets.get_dataset(completed, "test"), datasets.get_dataset(config, "test")
    )
