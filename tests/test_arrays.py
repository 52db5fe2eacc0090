"""Arrays as users have them: names, shapes, types, files that change; labels of any integers."""

import os
import threading

import numpy as np
import pytest
import torch
from data_files import encoded, example, pictures, tfrecord

import datasets
from configs.vp import images32_ddpmpp
from library.restoration import known_pixels
from sources import digests, folder
from sources.arrays import CONVERSION
from sources.base import MOST_CLASSES, Classes, Unreadable
from sources.folder import read_images
from sources.npy import StoredArray
from storage.files import plain, read_arrays

BEYOND = [2**62, 2**63 - 1, MOST_CLASSES, 2**31]  # labels above the largest allowed


def config_of(path, classes=0, channels=0, **data):
    config = images32_ddpmpp.get_config()
    config.data.update(path=str(path), image_size=8, num_channels=channels, num_classes=classes)
    config.data.update(num_workers=0, **data)
    return config


def mistake(path, **options):
    """The one line that says why the data at `path` are refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        datasets.get_dataset(config_of(path, **options), "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbered(n, first=0, channels=1):
    """Images (n, 8, 8, channels), each of one grey, from `first` on."""
    levels = np.arange(first, first + n, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n, 8, 8, channels))


def greys(path, split, **options):
    """{grey of an image: its label, None without} of a split."""
    data = datasets.get_dataset(config_of(path, **options), split)
    levels, labels = data[:][:, 0, 0, 0].tolist(), getattr(data, "labels", None)
    labels = len(levels) * [None] if labels is None else labels.tolist()
    return dict(zip(levels, labels, strict=True))


# --- names and shapes -----------------------------------------------------------------------------

TRAIN, TEST, VAL = numbered(12), numbered(5, 12), numbered(3, 17)
TRAIN_LABELS, TEST_LABELS = np.arange(12) % 3, np.arange(5) % 2
SPLIT_NAMES = {
    "MedMNIST": ("train_images", "train_labels", "test_images", "test_labels"),
    "Keras": ("x_train", "y_train", "x_test", "y_test"),
    "capitals": ("X_train", "Y_train", "X_test", "Y_test"),
    "without lines": ("Xtrain", "ytrain", "Xtest", "ytest"),
    "behind": ("train_x", "train_y", "val_x", "val_y"),
    "targets": ("train_data", "train_targets", "test_data", "test_targets"),
    "camels": ("trainImages", "trainLabels", "testImages", "testLabels"),
    "bare": ("train", "train_label", "test", "test_label"),
}


@pytest.mark.parametrize("names", SPLIT_NAMES.values(), ids=SPLIT_NAMES.keys())
@pytest.mark.parametrize("columns", [False, True])
def test_names_of_splits_and_their_labels(tmp_path, names, columns):
    labels = [np.expand_dims(y, 1) if columns else y for y in (TRAIN_LABELS, TEST_LABELS)]
    arrays = dict(zip(names, (TRAIN, labels[0], TEST, labels[1]), strict=True))
    np.savez(tmp_path / "x.npz", **arrays)
    path = tmp_path / "x.npz"
    assert greys(path, "train", classes=-1) == dict(enumerate(TRAIN_LABELS.tolist()))
    assert greys(path, "test", classes=-1) == dict(enumerate(TEST_LABELS.tolist(), 12))


WHOLE_NAMES = {
    "ADM": ("arr_0", "arr_1"),
    "of this program": ("samples", "labels"),
    "letters": ("X", "y"),
    "scikit-learn": ("data", "target"),
    "singular": ("image", "label"),
    "other": ("photos", "labels"),
    "classes": ("digits", "digits_classes"),
}


@pytest.mark.parametrize("names", WHOLE_NAMES.values(), ids=WHOLE_NAMES.keys())
def test_names_of_one_array_and_its_labels(tmp_path, names):
    others = {"seeds": np.arange(12), "nfe": np.array(3.0), "origin": np.array("words")}
    arrays = dict(zip(names, (TRAIN, TRAIN_LABELS), strict=True))
    np.savez(tmp_path / "x.npz", **arrays, **(others if "samples" in names else {}))
    both = greys(tmp_path / "x.npz", "train", classes=-1)
    both |= greys(tmp_path / "x.npz", "test", classes=-1)
    assert both == dict(enumerate(TRAIN_LABELS.tolist()))
    assert set(greys(tmp_path / "x.npz", "train").values()) == {None}


def test_a_third_split_is_left_out(tmp_path):
    np.savez(tmp_path / "x.npz", train_images=TRAIN, val_images=VAL, test_images=TEST)
    assert [*greys(tmp_path / "x.npz", "test")] == [*range(12, 17)]
    omitted = "1 array beside train_images and test_images (val_images)"
    assert folder.find(config_of(tmp_path / "x.npz").data).omitted == omitted


@pytest.mark.parametrize("name, resident_bytes", [("x.npy", 0), ("x.npy", 2**31), ("x.npz", 2**31)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_grey_images_need_no_channel(tmp_path, name, resident_bytes, order):
    images = np.asarray(pictures(20, 12, 10, 1)[..., 0], order=order)
    (np.save if name == "x.npy" else np.savez)(tmp_path / name, images)
    np.save(tmp_path / "four.npy", np.ascontiguousarray(images)[..., None])
    for split in datasets.SPLITS:
        config = config_of(tmp_path / name, resident_bytes=resident_bytes)
        grey = datasets.get_dataset(config, split)[:]
        assert torch.equal(grey, datasets.get_dataset(config_of(tmp_path / "four.npy"), split)[:])
        assert grey.shape[1:] == (1, 8, 8)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"a": pictures(9), "b": pictures(9)}, "it has a (9, 8, 8, 3), b (9, 8, 8, 3)"),
        ({"x": np.zeros((9,), np.uint8)}, "one array of images, or train and test; it has x (9,)"),
        ({"labels": np.zeros(9, int)}, "it has labels (9,)"),
        ({}, "it has none"),
    ],
)
def test_an_npz_without_one_array_of_images_says_what_it_has(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    assert words in mistake(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "array, words",
    [
        (pictures(9).astype(np.uint64), "not uint64 (9, 8, 8, 3)"),
        (pictures(9).transpose(0, 3, 1, 2), "save x.transpose(0, 2, 3, 1)"),
        (np.zeros((9, 192), np.uint8), "not uint8 (9, 192): save x.reshape(n, H, W, C)"),
        (pictures(9).astype(complex), "not complex128 (9, 8, 8, 3)"),
        (np.array("text"), "not <U4 ()"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no images: its shape is (0, 8, 8, 3)"),
        (np.zeros((9, 0, 8, 3), np.uint8), "holds no images"),
    ],
)
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_arrays_that_are_no_images_say_how_to_convert(tmp_path, name, array, words):
    if name == "x.npz" and array.ndim < 2:
        words = "it needs one array of images"
    (np.save if name == "x.npy" else np.savez)(tmp_path / name, array)
    assert words in mistake(tmp_path / name, channels=3)


@pytest.mark.parametrize("dtype", ["f4", ">u2", "i2", "?", "g"])
def test_the_conversion_that_a_message_says_is_right(dtype):
    values = {"?": [0, 1], ">u2": [0, 65535], "i2": [-32768, 32767]}.get(dtype, [-1, 1])
    x = np.array(values, dtype)
    code = CONVERSION.partition(" with ")[0]
    assert eval(code, {"x": x, "low": values[0], "high": values[1]}).tolist() == [0, 255]


def test_one_image_as_data_is_explained(tmp_path):
    (tmp_path / "one.png").write_bytes(encoded(pictures(1)[0]))
    (tmp_path / "one.JPG").write_bytes(encoded(pictures(1)[0], "JPEG"))
    (tmp_path / "all.tar").write_bytes(b"no zip")
    np.save(tmp_path / "one.npy", pictures(1, 32, 32)[0])
    for name in ("one.png", "one.JPG"):
        words = f"{name} is one image: name the folder with all of them, such as {tmp_path}"
        assert words in mistake(tmp_path / name)
    assert "looks like one image (H, W, C)" in mistake(tmp_path / "one.npy")
    assert "all.tar is no folder, .npy, .npz or zip file" in mistake(tmp_path / "all.tar")


# --- arrays of a few images -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bool, np.uint8])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("name", ["m.npy", "m.npz"])
def test_masks_as_arrays(tmp_path, dtype, axis, name):
    missing = np.zeros((2, 8, 8), bool)
    missing[0, :4] = missing[1, 2:, 3:] = True
    save = np.save if name == "m.npy" else np.savez
    stored = missing if dtype is bool else 255 * missing.astype(np.uint8)
    stored = stored if axis is None else stored[..., None]
    save(tmp_path / name, stored)
    mask = known_pixels(str(tmp_path / name), (8, 8), 2)
    assert (mask.numpy() == ~missing[:, None]).all()
    save(tmp_path / name, stored[0])
    assert (known_pixels(str(tmp_path / name), (8, 8), 5).numpy() == ~missing[0]).all()


@pytest.mark.parametrize(
    "mask, words",
    [
        (np.ones((8, 8)), f"not float64 (1, 8, 8): save {CONVERSION}"),
        (np.eye(8, dtype=np.uint8), "no pixel as missing: values from 128 to 255 do, and True"),
        (np.zeros((8, 8, 3), np.uint8), "must hold uint8 images (n, H, W, 1)"),
        (np.eye(7, dtype=bool), "has 7 x 7 pixels; the images have 8 x 8"),
        (np.zeros((0, 8, 8), bool), "holds no images"),
    ],
)
def test_masks_that_are_none_are_one_line(tmp_path, mask, words):
    np.save(tmp_path / "m.npy", mask)
    with pytest.raises(ValueError) as caught:
        known_pixels(str(tmp_path / "m.npy"), (8, 8), 1)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_images_of_arrays_with_labels_are_read(tmp_path):
    images = pictures(3, channels=1)
    np.savez(tmp_path / "ours.npz", samples=images, labels=np.arange(3), seeds=np.arange(3))
    np.savez(tmp_path / "adm.npz", images, np.arange(3))
    np.save(tmp_path / "grey.npy", images[..., 0])
    for name in ("ours.npz", "adm.npz", "grey.npy"):
        read = read_images("sampling.encode", str(tmp_path / name), 1)
        assert (np.stack([*read.values()]) == images).all()


# --- files that change ----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u1", ">f4", "<i2"])
def test_rows_are_those_that_numpy_reads(tmp_path, order, dtype):
    array = np.asarray(pictures(7, 5, 6, 2), dtype=dtype, order=order)
    np.save(tmp_path / "x.npy", array)
    stored = StoredArray.open(tmp_path / "x.npy")
    assert len(stored) == 7
    for i in range(7):
        assert (stored[i] == array[i]).all()
    assert (stored.whole() == array).all()
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")  # older programs took the digest of this
    assert stored.digest() == digests.of_array(mapped)


def test_the_digest_of_a_large_array_is_that_of_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCKS", 5)
    monkeypatch.setattr(digests, "BLOCK", 64)
    np.save(tmp_path / "x.npy", pictures(9))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    digest = StoredArray.open(tmp_path / "x.npy").digest()
    assert digest == digests.of_array(mapped) != digests.of_array(mapped, whole=True)


def write_smaller(path):
    np.save(path, pictures(3))


def write_as_large(path):
    np.save(path, pictures(20, seed=1))


def cut_off(path):
    os.truncate(path, 200)


def empty(path):
    path.write_bytes(b"")


def reshape(path):
    np.save(path, pictures(5, 16, 16))


@pytest.mark.parametrize("change", [write_smaller, write_as_large, cut_off, empty, reshape])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_array_that_is_written_again_is_one_line(tmp_path, change, workers):
    path = tmp_path / "x.npy"
    np.save(path, pictures(20))
    config = config_of(path, resident_bytes=0)
    data = datasets.get_dataset(config, "train")
    data.workers = workers
    assert len(data[:4]) == 4
    os.utime(path, ns=(0, 0))  # so that the clock's ticks do not matter
    data = datasets.get_dataset(config, "train")
    data.workers = workers
    before = data[:]
    change(path)
    with pytest.raises(ValueError, match=r"x\.npy was written again .*: start again"):
        [*data.batches([torch.arange(4)] * 3)]
    assert len(before) == 18


def test_a_file_that_takes_the_name_does_no_harm(tmp_path):
    """Data that are open stay as they are when another file is renamed over theirs."""
    np.save(tmp_path / "x.npy", pictures(20))
    data = datasets.get_dataset(config_of(tmp_path / "x.npy", resident_bytes=0), "train")
    before = data[:]
    np.save(tmp_path / "y.npy", pictures(20, seed=1))
    (tmp_path / "y.npy").replace(tmp_path / "x.npy")
    assert torch.equal(data[:], before)
    (tmp_path / "x.npy").unlink()
    assert torch.equal(data[:], before)


def test_reading_beside_a_writer_ends_in_one_line(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, pictures(2000))
    stored, stop = StoredArray.open(path), threading.Event()

    def write() -> None:
        while not stop.is_set():
            np.save(path, pictures(50))
            np.save(path, pictures(2000))

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(Unreadable, match="written again"):
        while True:
            stored[1999]
    stop.set()
    writer.join()


def test_a_pipe_of_arrays_is_not_waited_for(tmp_path):
    for name in ("x.npy", "x.npz"):
        os.mkfifo(tmp_path / name)
        assert "no regular file" in mistake(tmp_path / name)


@pytest.mark.parametrize("size", [0, 5, 9, 100, 127, 200])
def test_arrays_that_are_cut_off_are_one_line(tmp_path, size):
    np.save(tmp_path / "x.npy", pictures(20))
    os.truncate(tmp_path / "x.npy", size)
    assert "x.npy cannot be read" in mistake(tmp_path / "x.npy")


# --- labels and other arrays of any type ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["i1", "u1", ">i2", ">u4", "<i8", ">u8", "u8"])
def test_labels_of_any_integers(tmp_path, dtype):
    np.savez(tmp_path / "x.npz", images=TRAIN, labels=TRAIN_LABELS.astype(dtype))
    both = greys(tmp_path / "x.npz", "train", classes=-1)
    both |= greys(tmp_path / "x.npz", "test", classes=-1)
    assert both == dict(enumerate(TRAIN_LABELS.tolist()))
    assert datasets.Data(config_of(tmp_path / "x.npz", -1).data).measure_classes() == 3


@pytest.mark.parametrize("classes", [-1, 3])
@pytest.mark.parametrize(
    "labels, words",
    [
        *((np.int64([0] * 11 + [label]), f"a class label is {label}") for label in BEYOND),
        (np.uint64([0] * 11 + [2**64 - 1]), f"a class label is {2**64 - 1}; classes are numbered"),
        (np.uint64([0] * 11 + [2**63]), f"a class label is {2**63}"),
        (np.int64([0] * 11 + [-(2**63)]), "has the label -9223372036854775808"),
        (TRAIN_LABELS.astype(np.longdouble), "must be 12 whole numbers"),
        (TRAIN_LABELS > 0, "must be 12 whole numbers, one for each image, not bool (12,)"),
        (TRAIN_LABELS[:0], "not int64 (0,)"),
        (np.zeros((12, 2), int), "not int64 (12, 2)"),
    ],
)
def test_labels_out_of_bounds_are_one_line(tmp_path, labels, words, classes):
    np.savez(tmp_path / "x.npz", images=TRAIN, labels=labels)
    assert words in mistake(tmp_path / "x.npz", classes=classes)
    config = config_of(tmp_path / "x.npz", classes=classes)
    with pytest.raises(ValueError):
        datasets.Data(config.data).measure_classes()


@pytest.mark.parametrize("label", [*BEYOND, 2**64, 2**200])
def test_labels_of_a_dataset_json_out_of_bounds(tmp_path, label):
    for i, image in enumerate(pictures(9)):
        (tmp_path / f"{i}.png").write_bytes(encoded(image))
    lines = ", ".join(f'["{i}.png", {label if i == 3 else 0}]' for i in range(9))
    (tmp_path / "dataset.json").write_text(f'{{"labels": [{lines}]}}')
    assert f"has the label {label}"[:60] in mistake(tmp_path, classes=-1)


def test_classes_check_what_a_source_gives():
    assert Classes([1, 0, -1]).labels.dtype == np.int64
    assert Classes(np.array([1, 0], ">u2"), ("a", "b")).labels.tolist() == [1, 0]
    assert Classes(np.zeros(0, np.int8)).labels.tolist() == []
    for labels, names in (
        ([0, 2], ("a", "b")),  # 2 names, so that 2 is no class
        ([0, -2], ()),
        ([0.5], ()),
        (np.zeros((2, 2), int), ()),
        (np.uint64([2**64 - 1]), ()),
        ([2**70], ()),
    ):
        with pytest.raises(ValueError, match="class label"):
            Classes(labels, names)


def test_labels_of_records_out_of_bounds(tmp_path):
    """A record of tensorflow_datasets with two labels counts as one without a label."""
    from functools import partial

    from sources.prepared import _classes, stored_label
    from sources.tfrecords import TFRecords

    records = [example(label=[1]), example(label=[1, 2]), example(label=[0])]
    (tmp_path / "a.tfrecord").write_bytes(tfrecord(*records))
    read = partial(TFRecords([tmp_path / "a.tfrecord"], None).parsed, parse=stored_label)
    assert _classes(read, 3, ("a", "b")).labels.tolist() == [1, -1, 0]
    for label in (2, 2**62, 2**64 - 5):
        (tmp_path / "a.tfrecord").write_bytes(tfrecord(*records[:2], example(label=[label])))
        read = partial(TFRecords([tmp_path / "a.tfrecord"], None).parsed, parse=stored_label)
        with pytest.raises(ValueError, match="a class label is"):
            _classes(read, 3, ("a", "b"))


@pytest.mark.parametrize("dtype", [">f8", "g", ">g", ">f4", ">i8", ">u2", "f2", ">U3"])
def test_arrays_of_any_type_become_those_that_torch_takes(tmp_path, dtype):
    array = np.array([0, 1, 2]).astype(dtype)
    np.savez(tmp_path / "x.npz", x=array)
    for read in (read_arrays(tmp_path / "x.npz")["x"], plain(array)):
        assert read.dtype.isnative and read.tolist() == array.tolist()
        if dtype != ">U3":
            assert torch.from_numpy(read).tolist() == [0, 1, 2]


def test_numbers_too_large_for_64_bits_are_infinite():
    assert plain(np.array([np.longdouble("1e4000")])).tolist() == [np.inf]
