"""Identity of a run's data: which changes are noticed, refused, or allowed."""

import logging
import os
import re
import shutil
import weakref
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import example, pictures, tfrecord, write_tree, write_zip
from test_small_runs import report_of, tiny
from warm_start import run_main

import datasets
import experiment
import run_lib
from configs.vp import images32_ddpmpp
from metrics.reference import fingerprint
from sources import digests
from sources.base import Classes, Unreadable, View
from sources.batch import Conditions
from sources.identity import Identity
from sources.tfrecords import TFRecords
from storage import run_checkpoints
from storage.checkpoints import load_checkpoint, save_checkpoint

GREY = {"ant": 10, "bee": 20, "cat": 30}  # one grey for all images of a class


def grey(level, n=10):
    return [np.full((4, 4), level, np.uint8)] * n


def class_tree(root, names=GREY):
    for name in names:
        write_tree(root / name, grey(GREY[name]), "small_{i:03d}.png")  # one of each held out


def config_of(path, **data):
    config = images32_ddpmpp.get_config()
    config.data.update(path=str(path), image_size=4, num_channels=1, num_workers=0, **data)
    return config


def identity(path, **data):
    return datasets.Data(config_of(path, **data).data).identity


def changes(path, change, **data):
    """The message of a run that began before `change()` about the data after it."""
    before = identity(path, **data)
    change()
    return before.changes(identity(path, **data))


# --- what is a change -----------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    write_tree(tmp_path / "photos", pictures(20, 4, 4, 1)[..., 0], "img{i:03d}.png")
    return tmp_path / "photos"


def test_added_and_removed_files(photos):
    assert changes(photos, lambda: write_tree(photos, grey(1, 1), "x.png")) == (
        "18 to train and 2 to test on then, 19 to train and 2 to test on now"
    )
    assert "19 to train and 2 to test on then, 18 to train" in changes(
        photos, (photos / "x.png").unlink
    )


OTHER = "as many images as then, but other contents or names of files"


def test_a_replaced_file(photos):
    """A file replaced by one of the same size and time of change is noticed."""
    path = photos / "img007.png"
    content, at = path.read_bytes(), path.stat()
    assert changes(photos, lambda: path.write_bytes(content[:-1] + b"?")) == OTHER

    def swap():
        path.write_bytes(content)
        os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))

    assert changes(photos, swap) == OTHER


def test_a_renamed_file_and_names_alone(photos):
    def rename():
        (photos / "img007.png").rename(photos / "img007b.png")

    assert changes(photos, rename) == OTHER
    content = (photos / "img008.png").read_bytes()
    write = (photos / "img008.png").write_bytes
    assert changes(photos, lambda: write(content[:-1] + b"?"), digest="names") == ""
    assert changes(photos, lambda: write(content + b"?"), digest="names") == OTHER


def test_touched_files_moved_folders_and_zips_are_the_same_data(photos, tmp_path):
    def move():
        for path in photos.iterdir():
            os.utime(path)
        shutil.copytree(photos, tmp_path / "copy")

    assert changes(photos, move) == ""
    before = identity(photos)
    assert identity(tmp_path / "copy") == before
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / f"{kind}.zip", "w", kind) as file:
            for path in sorted(photos.iterdir(), reverse=kind == zipfile.ZIP_STORED):
                file.write(path, path.name)
        assert identity(tmp_path / f"{kind}.zip") == before


def test_a_zip_with_another_image(photos, tmp_path):
    write_zip(tmp_path / "a.zip", photos)
    before = identity(tmp_path / "a.zip")
    (photos / "img003.png").write_bytes((photos / "img004.png").read_bytes())
    write_zip(tmp_path / "a.zip", photos)
    assert before.changes(identity(tmp_path / "a.zip")) == OTHER


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_an_array_changed_in_one_place(tmp_path, monkeypatch, name, large):
    if large:  # the first and the last block, the only ones, hold what is changed
        monkeypatch.setattr(digests, "BLOCKS", 2)
        monkeypatch.setattr(digests, "BLOCK", 64)
    images = pictures(20, 4, 4, 1)
    save = np.save if name == "x.npy" else lambda path, x: np.savez(path, images=x)
    save(tmp_path / name, images)
    before = identity(tmp_path / name)
    save(tmp_path / name, images)
    assert identity(tmp_path / name) == before
    images[-1, -1, -1] ^= 1
    save(tmp_path / name, images)
    assert before.changes(identity(tmp_path / name)) == OTHER


def test_labels_count_where_they_are_read(tmp_path):
    images = pictures(20, 4, 4, 1)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(20) % 3)
    before = identity(tmp_path / "x.npz", num_classes=3)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(20) % 2)
    assert before.changes(identity(tmp_path / "x.npz", num_classes=3)) == OTHER
    write_tree(tmp_path / "d", grey(10))
    lines = ", ".join(f'["{i:03d}.png", {i % 3}]' for i in range(10))
    (tmp_path / "d/dataset.json").write_text(f'{{"labels": [{lines}]}}')
    with_labels, without = (identity(tmp_path / "d", num_classes=n) for n in (3, 0))
    (tmp_path / "d/dataset.json").write_text(f'{{"labels": [{lines.replace("2]", "1]")}]}}')
    assert with_labels.changes(identity(tmp_path / "d", num_classes=3)) == OTHER
    assert without.changes(identity(tmp_path / "d")) == ""


def test_records_count_with_their_checksums_and_order(tmp_path):
    path = tmp_path / "a.tfrecords"

    def digest(*values, index=(0, 1)):
        path.write_bytes(tfrecord(*(example(x=value) for value in values)))
        return TFRecords([path], len).digest_of(np.array(index))

    assert digest(b"ab", b"cd") == digest(b"ab", b"cd")
    assert len({digest(b"ab", b"cd"), digest(b"ab", b"ce"), digest(b"cd", b"ab")}) == 3
    assert digest(b"ab", b"cd", index=(1,)) == digest(b"xy", b"cd", index=(1,))


class Plain:
    """A source without a digest of its own, whose image 3 cannot be read."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if i == 3:
            raise Unreadable("3")
        return self.images[i]


def test_a_source_without_a_digest_counts_with_its_number_and_some_images():
    images = pictures(64, 4, 4, 1)
    other, first = images.copy(), digests.of_source(Plain(images))
    other[5] ^= 1
    assert digests.of_source(Plain(images.copy())) == first
    assert digests.of_source(Plain(other)) != first
    assert digests.of_source(Plain(images[:-1])) != first


def test_a_source_may_have_a_digest():
    source = Plain(pictures(4, 4, 4, 1))
    source.digest = lambda: "mine"
    assert digests.of_source(source) == "mine"
    view = View(source, np.asarray, np.arange(4))
    assert digests.of_source(view) != digests.of_source(View(source, np.asarray, np.arange(3)))


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def cached_photos(photos, tmp_path, monkeypatch):
    """Photos whose checksums are kept, written long ago; and the list of files that are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "MANY", 1)
    monkeypatch.setattr(digests, "FRESH", -(10**12))
    files, crc = [], digests._crc

    def noted(path, *limit):
        files.append(Path(path).name)
        return crc(path, *limit)

    monkeypatch.setattr(digests, "_crc", noted)
    return photos, files


def test_a_file_is_read_once(cached_photos):
    photos, files = cached_photos
    before = identity(photos)
    assert sorted(files) == sorted(os.listdir(photos))
    files.clear()
    assert identity(photos) == before
    assert files == []
    (photos / "img002.png").write_bytes(b"another")
    assert identity(photos) != before
    assert files == ["img002.png"]


def test_checksums_are_those_of_zlib(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "PIECE", 7)
    for path in photos.iterdir():
        assert digests._crc(str(path), None) == zlib.crc32(path.read_bytes())


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY"])
def test_a_damaged_cache_is_written_anew(cached_photos, tmp_path, content):
    photos, files = cached_photos
    before = identity(photos)
    (path,) = (tmp_path / "cache/pfgm").iterdir()
    path.write_bytes(content)
    assert identity(photos) == before
    files.clear()
    assert identity(photos) == before
    assert files == []


def test_a_cache_that_cannot_be_written_is_one_line(cached_photos, tmp_path, caplog):
    photos, files = cached_photos
    (tmp_path / "cache").write_text("a file where the folder should be")
    before = identity(photos)
    messages = [r.getMessage() for r in caplog.records]
    assert messages
    assert all(re.fullmatch("the checksums of the data are not kept.*", line) for line in messages)
    assert identity(photos) == before


def test_what_was_written_just_now_is_read_again(cached_photos, monkeypatch):
    """A file may change twice within a tick of its clock."""
    photos, files = cached_photos
    monkeypatch.setattr(digests, "FRESH", 10**12)
    identity(photos)
    identity(photos)
    assert sorted(files) == sorted(2 * os.listdir(photos))


# --- class numbers --------------------------------------------------------------------------------


def run_of(path, **data):
    """The data as a run sees them that began with those that are at `path` now."""
    stored = identity(path, num_classes=-1)
    return lambda **more: datasets.Data(config_of(path, num_classes=3, **data, **more).data, stored)


def check_numbers(data, levels):
    for split in datasets.SPLITS:
        images = data.get(split)
        assert images.names == tuple(GREY)
        numbers = [levels[int(image[0, 0, 0])] for image in images[:]]
        assert images.labels.tolist() == data.labels(split).tolist() == numbers


@pytest.mark.parametrize("limit", [0, 2**31])
def test_a_class_keeps_its_number(tmp_path, limit):
    class_tree(tmp_path)
    run = run_of(tmp_path, resident_bytes=limit)
    check_numbers(run(), {10: 0, 20: 1, 30: 2})
    shutil.rmtree(tmp_path / "ant")
    with pytest.raises(ValueError, match=r"gone: class 'ant'\): restore them, .*changed=allow"):
        run().get("test")
    with pytest.raises(ValueError, match="gone: class 'ant'"):
        run().labels("train")
    allowed = run(changed="allow")
    check_numbers(allowed, {20: 1, 30: 2})
    assert allowed.identity_of_run().classes == tuple(GREY)


def test_a_new_class_is_refused(tmp_path):
    class_tree(tmp_path)
    run = run_of(tmp_path)
    write_tree(tmp_path / "bat", grey(15))
    with pytest.raises(
        ValueError, match=r"new: class 'bat'\): restore them, or start a new w[a-z]*$"
    ):
        run().get("train")
    data = run(changed="allow")
    with pytest.raises(
        ValueError, match="has no number for the class 'bat': .* 'ant', 'bee', 'cat'"
    ):
        data.get("train")


def test_what_is_allowed_is_said_once(tmp_path, caplog):
    class_tree(tmp_path)
    run = run_of(tmp_path)
    shutil.rmtree(tmp_path / "ant")
    data = run(changed="allow")
    data.get("train"), data.labels("test")
    data.close(), data.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.fullmatch(r"the data .*27 to .*18 to.*gone: class 'ant'\): .*", record.getMessage())


def test_what_is_allowed_is_said_of_data_that_were_closed_before(tmp_path, caplog):
    class_tree(tmp_path)
    run = run_of(tmp_path)
    shutil.rmtree(tmp_path / "ant")
    data = run(changed="allow")
    data.close()
    assert not caplog.records
    data.get("train"), data.labels("test")
    (record,) = caplog.records
    assert "gone: class 'ant'): data.changed='allow'" in record.getMessage()


def test_digests_of_two_kinds_are_not_compared(tmp_path, caplog):
    write_tree(tmp_path, grey(1, 20))
    stored = identity(tmp_path)
    data = datasets.Data(config_of(tmp_path, digest="names").data, stored)
    data.get("train")
    data.close()
    assert "are not compared" in caplog.text
    write_tree(tmp_path, grey(1, 1), "x.png")
    with pytest.raises(ValueError, match="19 to train"):
        datasets.Data(config_of(tmp_path, digest="names").data, stored).get("train")


def test_labels_of_damaged_records_stay():
    run = Identity(1, 1, ("a", "b", "c"), "")
    classes = run.renumbered(Classes(np.array([0, -1, 1]), ("b", "c")))
    assert classes.labels.tolist() == [1, -1, 2]
    assert classes.names == ("a", "b", "c")


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the classes and a run of two steps on it."""
    root = tmp_path_factory.mktemp("identity")
    class_tree(root / "data")
    run_lib.train(own_config(root), root / "run")
    return root


def own_config(root, **values):
    values = {"data__image_size": 4, "data__num_classes": -1, "training__label_dropout": 0} | values
    values |= {"data__path": str(root / "data"), "training__snapshot_freq": 2}
    return tiny("vp/images32_ddpmpp.py", root, **values)


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    return tmp_path / "a"


def newest(root):
    return load_checkpoint(root / "run/checkpoints-meta/checkpoint.pth")


def test_checkpoints_have_the_identity(run):
    stored = Identity.read(Path("x"), newest(run))
    expected = identity(run / "data", num_classes=3)
    assert stored == expected
    assert (stored.train, stored.test, stored.classes) == (27, 3, tuple(GREY))
    numbered = load_checkpoint(run / "run/checkpoints/checkpoint_2.pth")
    assert numbered["data"] == newest(run)["data"]


def test_a_run_goes_on_with_other_data_where_it_is_allowed_once(run, caplog):
    shutil.rmtree(run / "data/ant")
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="gone: class 'ant'"):
            run_lib.train(own_config(run, training__n_iters=3), run / "run", dry_run)
    with pytest.raises(ValueError, match="gone: class 'ant'"):
        run_lib.evaluate(own_config(run), run / "run")
    caplog.clear()
    allowed = own_config(run, data__changed="allow", eval__enable_loss=True)
    run_lib.evaluate(allowed, run / "run", dry_run=True)
    assert caplog.text.count("gone: class 'ant'): data.changed='allow'") == 1
    run_lib.train(own_config(run, training__n_iters=3, data__changed="allow"), run / "run")
    assert "gone: class 'ant'): data.changed='allow'" in (run / "run/stdout.txt").read_text()
    content = newest(run)
    assert content["step"] == 3
    assert content["data"]["classes"] == list(GREY)
    assert content["data"]["train"] == 18
    assert content["config"]["data.changed"] == "refuse"
    assert content["config"]["data.num_classes"] == 3
    run_lib.train(own_config(run, training__n_iters=4), run / "run")  # the run's data from now on
    class_tree(run / "data", ["ant"])
    with pytest.raises(ValueError, match="18 to train and 2 to test on then, 27 to train"):
        run_lib.train(own_config(run, training__n_iters=5), run / "run")


def test_evaluation_numbers_classes_as_the_run(run):
    """The labels that samples are drawn for, and those of the images, are of the run's classes."""
    shutil.rmtree(run / "data/ant")
    values = {"data__changed": "allow", "eval__enable_classification": True}
    run_lib.evaluate(own_config(run, **values), run / "run")
    report = report_of(run / "run", 1)
    assert report["class_log_p"].shape == (2, 3)
    assert (np.exp(report["class_log_p"][:, 0]) < 1e-25).all()  # no training image is an ant
    with np.load(run / "run/eval/ckpt_1/samples_0.npz") as samples:
        assert set(samples["labels"].tolist()) == {1, 2}


def test_loading_needs_no_data_and_has_the_names(run):
    shutil.rmtree(run / "data")
    assert experiment.load(run / "run").class_names == tuple(GREY)
    run_lib.export(own_config(run), run / "run")
    shared = experiment.load(run / "run/model.safetensors")
    assert shared.class_names == tuple(GREY)
    assert shared.experiment.data.stored == Identity.read(Path("x"), newest(run))


@pytest.mark.parametrize("name", ["bee", "cat"])
def test_a_class_is_named_in_every_place(run, name, caplog):
    """On the command line, in the library's overrides and arguments, in a config."""
    number, seeds = tuple(GREY).index(name), [3, 4]
    trained = experiment.load(run / "run")
    expected = trained.sample(seeds, number)
    assert torch.equal(trained.sample(seeds, name), expected)
    assert torch.equal(trained.sample(seeds, [name, number]), expected)
    assert trained.labels(np.array([name, "ant"]), 2).tolist() == [number, 0]
    overridden = experiment.load(run / "run", {"sampling.class_label": name})
    assert torch.equal(overridden.sample(seeds), expected)
    config = trained.experiment.config
    again = experiment.load(run / "run", {"sampling.class_label": name}, config=config)
    assert torch.equal(again.sample(seeds), expected)
    flags = ["--mode=sample", f"--workdir={run / 'run'}", f"--outdir={run / 'a'}"]
    flags += [f"--config.sampling.class_label={name}", "--config.sampling.seeds=3-4"]
    done = run_main([*flags, f"--config.data.path={run / 'data'}"])
    assert f"sampling.class_label={number} is the class '{name}'" in done.stdout
    with np.load(run / "a/samples.npz") as samples:
        assert samples["labels"].tolist() == [number, number]
    values = {"eval__enable_sampling": True, "sampling__class_label": name}
    run_lib.evaluate(own_config(run, **values), run / "run")
    with np.load(run / "run/eval/ckpt_1/samples_0.npz") as samples:
        assert set(samples["labels"].tolist()) == {number}


def test_names_of_no_class_are_one_line(run):
    trained = experiment.load(run / "run")
    says = r"class_label='bea' is the name of no class of the run: it has those called 'bee', "
    for ask in (
        lambda: trained.sample([0], "bea"),
        lambda: trained.labels(["bee", "bea"], 2),
        lambda: experiment.load(run / "run", {"sampling.class_label": "bea"}),
        lambda: run_lib.train(own_config(run, sampling__class_label="bea"), run / "run"),
    ):
        with pytest.raises(ValueError, match=says):
            ask()
    for wrong in (1.0, True, None, ["bee"], "a\nb", ""):
        with pytest.raises(ValueError, match="sampling.class_label must be a whole number .*, or"):
            experiment.load(run / "run", {"sampling.class_label": wrong})
    unlabelled = own_config(run, data__num_classes=0, sampling__class_label="bee")
    with pytest.raises(ValueError, match="no class of the run: it has none with a name"):
        experiment.Experiment.build(unlabelled)


def test_a_new_run_knows_the_names_of_its_data(run):
    """Composed and decomposed names are one, and numbers remain numbers."""
    for name in ("2", "10", "caf\u00e9", "-1"):
        write_tree(run / "other" / name, grey(1))
    config = own_config(run, data__num_classes=4, data__num_channels=1)
    config.data.path = str(run / "other")
    for label, number in (("cafe\u0301", 3), ("10", 1), ("-1", 2), ("2", 0), (2, 2), (-1, -1)):
        config.sampling.class_label = label
        built = experiment.Experiment.build(config)
        assert built.sampler.class_label == built.config.sampling.class_label == number


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ">i4", np.uint64, np.int64])
def test_labels_of_any_integers_are_asked_for(run, dtype):
    trained = experiment.load(run / "run")
    labels = np.array([2, 0], dtype)
    assert trained.labels(labels, 2).tolist() == [2, 0]
    assert trained.labels(labels[0], 2).tolist() == [2, 2]
    if np.dtype(dtype).isnative:
        assert trained.labels(torch.from_numpy(labels), 2).tolist() == [2, 0]
    for wrong in (2**64 - 1, 2**62, 3, -1, -(2**63)):
        with pytest.raises(ValueError, match="is no class of the network: it has those from 0"):
            trained.labels(wrong, 2)
    assert trained.sample([]).shape == (0, 1, 4, 4)


def rewrite(root, data):
    """The run's checkpoints with another entry `data`, or without one for None."""
    for path in (root / "run").glob("checkpoints*/*.pth"):
        content = {k: v for k, v in load_checkpoint(path).items() if k != "data"}
        save_checkpoint(path, content if data is None else content | {"data": data})


def test_a_run_without_identity_gets_it_and_says_so(run, caplog):
    caplog.set_level(logging.INFO)  # as main.py sets it
    rewrite(run, None)
    shutil.rmtree(run / "data/ant")  # nobody can know
    run_lib.train(own_config(run, training__n_iters=3), run / "run")
    message = "does not say what its data were; from here on they are these, digest content:"
    assert message in (run / "run/stdout.txt").read_text()
    assert newest(run)["data"]["classes"] == ["bee", "cat"]
    assert newest(run)["data"]["train"] == 18


@pytest.mark.parametrize(
    "change",
    [
        7,
        "x" * 10**6,
        [["train", 27]],
        {},
        {"train": -1},
        {"train": 2**60},
        {"test": True},
        {"test": 2.0},
        {"test": torch.zeros(3)},
        {"classes": "abc"},
        {"classes": [1, 2, 3]},
        {"classes": ["a", "a", "b"]},
        {"classes": ["x" * 10**6]},
        {"digest": "content:"},
        {"digest": None},
        {"digest": "content:" + "0" * 63 + "\n"},
        {"more": 1},
    ],
)
def test_hostile_identities_are_one_line(run, change):
    entry = newest(run)["data"] | change if type(change) is dict and change else change
    rewrite(run, entry)
    for start in (
        lambda: run_lib.train(own_config(run, training__n_iters=3), run / "run"),
        lambda: run_lib.evaluate(own_config(run), run / "run"),
        lambda: experiment.load(run / "run"),
    ):
        with pytest.raises(ValueError, match=r"\.pth: its data are no identity of data: ") as error:
            start()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000


def test_a_damaged_newest_checkpoint_is_passed_over(run):
    path = run / "run/checkpoints-meta/checkpoint.pth"
    path.write_bytes(path.read_bytes()[:1000])
    assert run_checkpoints.peek(run / "run")[0] == run / "run/checkpoints/checkpoint_2.pth"
    assert experiment.identity_of(run / "run").train == 27
    assert experiment.identity_of(run / "nowhere") is None


# --- what is cached -------------------------------------------------------------------------------


def test_fingerprints_of_images_in_memory_count_every_byte_and_their_order():
    images = torch.from_numpy(pictures(400, 2, 2, 1)).permute(0, 3, 1, 2).contiguous()
    first, other = fingerprint(images), images.clone()
    other[1] ^= 1
    assert fingerprint(images.clone()) == first
    labelled = datasets.Resident(images, Conditions(class_labels=torch.zeros(400)))
    assert fingerprint(labelled) == first
    different = (other, images.flip(0), images[:399], images.view(400, 1, 1, 4))
    assert len({first, *map(fingerprint, different)}) == 5


def test_fingerprints_of_streams_count_all_files_and_how_they_are_decoded(tmp_path):
    write_tree(tmp_path, pictures(400, 8, 8, 1)[..., 0], "{i:03d}.png")

    def get(**data):
        config = config_of(tmp_path, resident_bytes=0)
        config.data.update(data)
        return datasets.get_dataset(config, "train")

    first = fingerprint(get())
    assert fingerprint(get()) == first
    assert fingerprint(get(image_size=8)) != first
    number = int(get().source.index[1])  # not among the 64 of 360 images that are decoded
    write_tree(tmp_path, grey(1, 1), f"{number:03d}.png")
    assert fingerprint(get()) != first


def test_results_of_other_data_are_computed_anew(run):
    """After one image is replaced, reference statistics and loss are those of the new data."""
    values = {"eval__enable_loss": True, "eval__dataset": "train", "data__changed": "allow"}
    run_lib.evaluate(own_config(run, **values), run / "run")
    first = report_of(run / "run", 1)
    (run / "data/bee/small_004.png").write_bytes((run / "data/cat/small_004.png").read_bytes())
    run_lib.evaluate(own_config(run, **values), run / "run")
    assert report_of(run / "run", 1)["loss"] != first["loss"]
    assert len(list((run / "stats").iterdir())) == 2


def test_splits_of_one_packed_array_hold_one_copy(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4, 1))
    data = datasets.Data(config_of(path).data)
    first = data.identity
    train, test = (data._source(split).source.array for split in datasets.SPLITS)
    assert np.shares_memory(train, test)
    unpacked = weakref.ref(train)
    del train, test
    data.close()
    assert unpacked() is None  # none is held for the next time
    np.savez(path, images=np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4, 1)[::-1])
    assert datasets.Data(config_of(path).data).identity != first
