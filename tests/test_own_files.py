"""Data sets in the files in which they are published: images, labels, splits, and their faults."""

import gzip
import io
import os
import pickle
import re
import struct
import sys
import tarfile
import types

import fake_pyarrow
import numpy as np
import pytest
import torch
from conftest import peak
from data_files import encoded, pictures, write_tree
from own_files import (
    NAMES,
    cifar_100,
    cifar_binary,
    cifar_python,
    examples,
    has_pyarrow,
    idx,
    mnist,
    pickle_of_python_2,
    planes,
    write_files,
    write_parquet,
    write_tar,
)
from test_sources import config_of

import datasets
from sources import folder, parquet, tars
from sources import idx as idx_files
from sources.shards import Shards
from sources.splits import held_out

LABELS = [3, 0, 7, 7, 9, 1, 2, 5, 5, 4, 8, 6]


def folder_config(path, size=8, channels=0, **data):
    return config_of("folder", size, channels, path=str(path), **{"num_workers": 0} | data)


def read(path, split, size=8, classes=10, **data):
    """The images (n, H, W, C) of a split, and their labels; from memory and from disk alike."""
    results = []
    for limit in (2**31, 0):
        config = folder_config(path, size, num_classes=classes, resident_bytes=limit, **data)
        config.data.num_channels = datasets.Data(config.data).measure_channels()
        rows = datasets.get_dataset(config, split)
        images = rows[: len(rows)].permute(0, 2, 3, 1).numpy()
        results.append((images, rows.labels.numpy() if classes else None))
    (images, labels), (again, labels_again) = results
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
    return images, labels


def mistake(path, split="train", **data):
    """The line that refuses the data."""
    with pytest.raises((ValueError, OSError)) as error:
        datasets.get_dataset(folder_config(path, **data), split)
    assert "\n" not in str(error.value)
    return str(error.value)


def identity(path, **data):
    return datasets.Data(folder_config(path, **data).data).identity


# --- CIFAR ----------------------------------------------------------------------------------------

CIFAR = {
    "python": ("cifar-10-python.tar.gz", cifar_python),
    "binary": ("cifar-10-binary.tar.gz", cifar_binary),
    "100-python": ("cifar-100-python.tar.gz", lambda *files: cifar_100(*files, binary=False)),
    "100-binary": ("cifar-100-binary.tar.gz", lambda *files: cifar_100(*files, binary=True)),
}


def test_the_pickles_of_these_tests_are_pickles():
    images = pictures(2, 32, 32)
    entries = pickle_of_python_2({b"data": planes(images), b"labels": [1, 2], b"x": [b"a"]})
    entries = pickle.loads(entries, encoding="latin1")
    assert entries["labels"] == [1, 2] and entries["x"] == ["a"]
    np.testing.assert_array_equal(entries["data"], planes(images))


@pytest.mark.parametrize("place", ["archive", "plain tar", "folder", "folder above"])
@pytest.mark.parametrize("kind", CIFAR)
def test_cifar(tmp_path, kind, place):
    name, files_of = CIFAR[kind]
    images = pictures(12, 32, 32)
    files = files_of(images, LABELS)
    path = tmp_path / (name if place == "archive" else name.removesuffix(".gz"))
    if place in ("archive", "plain tar"):
        write_tar(path, files)
    else:
        write_files(tmp_path / "data", files)
        path = tmp_path / "data"
        path = next(path.iterdir()) if place == "folder" else path
    for split, part in (("train", slice(10)), ("test", slice(10, 12))):
        pixels, labels = read(path, split, 32)
        np.testing.assert_array_equal(pixels, images[part])
        assert labels.tolist() == LABELS[part]
    data = datasets.Data(folder_config(path, num_classes=10).data)
    assert data.get("train").names == NAMES
    assert data.split_words == "train and test"
    assert data.identity.classes == NAMES


def test_archives_and_folders_of_cifar_are_the_same_data(tmp_path):
    images = pictures(12, 32, 32)
    files = cifar_python(images, LABELS)
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    write_files(tmp_path / "data", files)
    before = identity(tmp_path / "cifar-10-python.tar.gz", num_classes=10)
    assert identity(tmp_path / "data", num_classes=10) == before
    other = cifar_python(images, [*LABELS[:-1], 0])
    write_files(tmp_path / "data", other)
    assert identity(tmp_path / "data", num_classes=10) != before
    assert identity(tmp_path / "data") == identity(tmp_path / "cifar-10-python.tar.gz")
    images[0, 0, 0, 0] ^= 1
    write_files(tmp_path / "data", cifar_python(images, LABELS))
    assert identity(tmp_path / "data", num_classes=10) != before


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


def test_pickles_of_cifar_run_nothing(tmp_path):
    """A damaged file, or one of another kind, is refused in one line that names it."""
    images = pictures(12, 32, 32)
    files = cifar_python(images, LABELS)
    place = "cifar-10-batches-py/data_batch_3"
    good = files[place]
    short = pickle_of_python_2({b"data": planes(images[:2]), b"labels": [1]})
    other = pickle_of_python_2({b"data": planes(images[:2]), b"labels": [b"x", b"y"]})
    bad = {
        "refers to '__builtin__.eval'": pickle.dumps({"data": Evil(), "labels": [1]}, protocol=2),
        "damaged|ended|exhausted": good[:100],
        "no array of images": pickle_of_python_2({b"labels": [1]}),
        "not those of 1 images": short,
        "a label is no class's number": other,
        "no dictionary": pickle.dumps([1], protocol=2),
        "": b"",
    }
    for number, (words, content) in enumerate(bad.items()):
        path = tmp_path / f"cifar-10-{number}.tar.gz"
        write_tar(path, files | {place: content})
        assert re.search(rf"data_batch_3 is no file of CIFAR: .*({words})", mistake(path))


def test_binary_files_of_cifar_that_are_cut_off(tmp_path):
    files = cifar_binary(pictures(12, 32, 32), LABELS)
    place = "cifar-10-batches-bin/data_batch_2.bin"
    for content in (files[place][:-1], b""):
        write_files(tmp_path, files | {place: content})
        assert "data_batch_2.bin is no file of CIFAR: its size, " in mistake(tmp_path)


def test_archives_of_cifar_that_are_damaged(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    files = cifar_python(pictures(12, 32, 32), LABELS)
    write_tar(path, files)
    content = path.read_bytes()
    for size in (len(content) // 2, 1000):
        path.write_bytes(content[:size])
        assert "cifar-10-python.tar.gz" in mistake(path)
    write_tar(path, {name: files[name] for name in [*files][1:]})
    assert "it lacks files of CIFAR; it has batches.meta, data_batch_2" in mistake(path)
    write_tar(path, files | {"cifar-10-batches-py/a/data_batch_1": b""})
    assert "cannot be read at random" in mistake(path)


def test_a_header_that_claims_to_be_long_takes_no_memory(tmp_path):
    """A member whose name takes 2^28 bytes, which gzip packs well."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**28
    for name, pack in (("cifar-10-python.tar.gz", gzip.compress), ("a.tar", bytes)):
        with open(tmp_path / name, "wb") as file:
            file.write(pack(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**25)))
        assert peak(lambda name=name: mistake(tmp_path / name)) < 2**24


# --- MNIST ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
def test_mnist(tmp_path, packed, place):
    images, labels = pictures(12, 8, 8, 1), np.array(LABELS)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    write_files(tmp_path / place, mnist(images[..., 0], labels, 4, packed))
    for split, part in (("train", slice(8)), ("test", slice(8, 12))):
        pixels, numbers = read(tmp_path, split)
        np.testing.assert_array_equal(pixels, images[part])
        assert numbers.tolist() == LABELS[part]


def test_a_test_split_of_mnist_without_labels(tmp_path):
    files = mnist(pictures(12, 8, 8, 1)[..., 0], np.array(LABELS), 4, packed=True)
    write_files(
        tmp_path, {name: c for name, c in files.items() if name != "t10k-labels-idx1-ubyte.gz"}
    )
    assert read(tmp_path, "train")[1].tolist() == LABELS[:8]
    assert read(tmp_path, "test")[1].tolist() == [-1] * 4


def test_any_idx_file_of_images(tmp_path):
    """IDX files are known by content, grey or colour; labels are in the file beside them."""
    for name, images in (("a", pictures(20, 8, 8, 1)), ("b-images-idx4", pictures(20))):
        array = images[..., 0] if images.shape[3] == 1 else images
        (tmp_path / name).write_bytes(idx(array))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            for split in datasets.SPLITS:
                pixels, _ = read(path, split, classes=0)
                np.testing.assert_array_equal(pixels, images[held_out(20, split)])
    assert "there is no file of labels beside the images" in mistake(tmp_path / "a", num_classes=2)
    (tmp_path / "b-labels-idx4").write_bytes(idx(np.arange(20, dtype=np.uint8)))
    _, labels = read(tmp_path / "b-images-idx4.gz", "test", classes=20)
    assert labels.tolist() == held_out(20, "test").tolist()


def test_an_unpacked_file_of_mnist_counts_before_the_packed_one(tmp_path):
    images, labels = pictures(12, 8, 8, 1)[..., 0], np.array(LABELS)
    write_files(tmp_path, mnist(images, labels, 4, packed=True))
    write_files(tmp_path, mnist(255 - images, labels, 4, packed=False))
    pixels, _ = read(tmp_path, "test")
    np.testing.assert_array_equal(pixels[..., 0], 255 - images[8:])


def test_several_data_sets_of_idx_files_in_a_folder(tmp_path):
    files = mnist(pictures(12, 8, 8, 1)[..., 0], np.array(LABELS), 4, packed=True)
    write_files(tmp_path, {f"emnist-{k}-{n}": c for k in "ab" for n, c in files.items()})
    assert "2 data sets: name the images of one, such as " in (words := mistake(tmp_path))
    path = tmp_path / "emnist-a-train-images-idx3-ubyte.gz"
    assert str(path) in words
    assert read(path, "train")[1].tolist() == [LABELS[i] for i in held_out(8, "train")]


@pytest.mark.parametrize(
    "content, words",
    [
        (idx(np.zeros((2, 4, 4), np.uint8))[:-1], "it is cut off: 31 bytes of 32|cannot hold"),
        (idx(np.zeros((2, 4, 4), np.uint8)) + b"x", "it holds more than the 32 bytes"),
        (idx(np.zeros((2, 4, 4), np.float32), 13), r"type 0x0D on 3 axes; .*save others as \.npy"),
        (idx(np.zeros(9, np.uint8)), "holds labels: name the file of the images"),
        (idx(np.zeros((0, 4, 4), np.uint8)), r"its shape is \(0, 4, 4\)"),
        (b"\0\0\x08\x03" + struct.pack(">3I", *[2**32 - 1] * 3), "claims .* cannot hold"),
        (b"\0\0\x08\x03\0\0", r"its shape is \(\)|buffer"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_that_are_none(tmp_path, content, words, packed):
    path = tmp_path / "a-idx3-ubyte"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert re.search(words, mistake(path))


def test_an_idx_file_that_unpacks_to_much_more_takes_no_memory(tmp_path):
    (tmp_path / "a").write_bytes(gzip.compress(idx(np.zeros((1, 2**13, 2**13), np.uint8)) * 3))
    with pytest.raises(ValueError, match="cannot hold|more than"):
        idx_files.read_idx(tmp_path / "a")
    head = b"\0\0\x08\x03" + struct.pack(">3I", 2**8, 2**13, 2**13)
    (tmp_path / "b").write_bytes(gzip.compress(head + bytes(2**20)))
    assert peak(lambda: mistake(tmp_path / "b")) < 2**23


# --- tars -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_examples(tmp_path, format, kind):
    images = pictures(12)
    write_tar(tmp_path / "a.tar", examples(images, LABELS, kind=kind), format)
    contents = {}
    for split in datasets.SPLITS:
        pixels, labels = read(tmp_path / "a.tar", split)
        contents |= {p.tobytes(): int(label) for p, label in zip(pixels, labels, strict=True)}
    assert contents == {i.tobytes(): label for i, label in zip(images, LABELS, strict=True)}
    config = folder_config(tmp_path / "a.tar")
    assert folder.find(config.data).omitted == ""


def test_a_tar_is_split_as_a_folder_of_the_same_files(tmp_path):
    """Names that begin with "./", are long or not ASCII, are split as in a folder."""
    files = {f"{'long/' * 40}ü{i}.png": encoded(pictures(30)[i]) for i in range(30)}
    write_files(tmp_path / "files", files)
    write_tar(tmp_path / "a.tar", {f"./{name}": content for name, content in files.items()})
    for split in datasets.SPLITS:
        from_tar, _ = read(tmp_path / "a.tar", split, classes=0)
        from_folder, _ = read(tmp_path / "files", split, classes=0)
        np.testing.assert_array_equal(from_tar, from_folder)


def test_classes_of_a_tar_are_folders_where_it_has_no_labels(tmp_path):
    names = [f"set/{NAMES[k % 3]}/{k}.png" for k in range(12)]
    files = {name: encoded(np.full((8, 8), k, np.uint8)) for k, name in enumerate(names)}
    write_tar(tmp_path / "a.tar", files | {"set/notes.txt": b"", "set/.hidden.png": b""})
    for split in datasets.SPLITS:
        pixels, labels = read(tmp_path / "a.tar", split, classes=3)
        assert labels.tolist() == [int(p[0, 0, 0]) % 3 for p in pixels]
    data = datasets.Data(folder_config(tmp_path / "a.tar", num_classes=3).data)
    splits = [data.get(split) for split in datasets.SPLITS]
    assert "left out: 1 .txt, 1 hidden file" in data.describe(*splits)
    assert data.get("train").names == ("ant", "bee", "cat")


@pytest.mark.parametrize("pattern", ["{name}", "{name}/d-{{000008..000010}}.tar"])
def test_many_tars(tmp_path, pattern):
    images, names = pictures(12), ("d-000008", "d-000009", "d-000010")
    (tmp_path / "x").mkdir()
    for number, name in enumerate(names):
        part = slice(4 * number, 4 * number + 4)
        write_tar(tmp_path / f"x/{name}.tar", examples(images[part], LABELS[part]))  # equal keys
    path = pattern.format(name=tmp_path / "x")
    contents = {}
    for split in datasets.SPLITS:
        pixels, labels = read(path, split)
        contents |= {p.tobytes(): int(label) for p, label in zip(pixels, labels, strict=True)}
    assert contents == {i.tobytes(): label for i, label in zip(images, LABELS, strict=True)}
    assert folder.exists(path)


def test_splits_are_told_by_the_names_of_tars(tmp_path):
    images = pictures(12)
    for number, name in enumerate(("in1k-train-000", "in1k-train-001", "in1k-validation-000")):
        part = slice(4 * number, 4 * number + 4)
        write_tar(tmp_path / f"{name}.tar", examples(images[part], LABELS[part]))
    for split, part in (("train", slice(8)), ("test", slice(8, 12))):
        pixels, labels = read(tmp_path, split)
        np.testing.assert_array_equal(pixels, images[part])
        assert labels.tolist() == LABELS[part]


def test_patterns_that_name_nothing(tmp_path):
    write_tar(tmp_path / "a-0.tar", examples(pictures(4), LABELS[:4]))
    assert re.search(
        r"a-\{0\.\.1\}\.tar: .*a-1\.tar does not exist", mistake(tmp_path / "a-{0..1}.tar")
    )
    assert "is no range" in mistake(tmp_path / "a-{3..1}.tar")
    assert "too many files" in mistake(tmp_path / "a-{0..999999999}{0..9}.tar")
    assert not folder.exists(str(tmp_path / "a-{0..1}.tar"))
    assert Shards.of_pattern("a.tar") is None


def test_a_negative_size_in_an_archive_of_cifar_ends(tmp_path):
    member = tarfile.TarInfo("cifar-10-batches-py/other")
    member.size = -(2**12)
    content = member.tobuf(tarfile.GNU_FORMAT) * 32
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(content))
    assert "cannot be read as an archive of CIFAR" in mistake(tmp_path / "cifar-10-python.tar.gz")


@pytest.mark.parametrize("mutate", ["cut", "cut header", "checksum", "long", "negative", "empty"])
def test_tars_that_are_damaged(tmp_path, mutate):
    path = tmp_path / "a.tar"
    write_tar(path, examples(pictures(4), LABELS[:4]))
    content = bytearray(path.read_bytes())
    second = 512 + 512 * -(-int(content[124:135], 8) // 512)
    if mutate.startswith("cut"):
        content = content[: 700 if mutate == "cut" else second + 300]
    elif mutate == "checksum":
        content[second] ^= 1
    elif mutate == "empty":
        content = content[:0]
    else:
        header = tarfile.TarInfo("b.png")
        header.size = 2**40 if mutate == "long" else -(2**20)
        buffer = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        content[second : second + 512] = buffer
    path.write_bytes(content)
    assert re.search(r"a\.tar (cannot be read as a tar file|is no folder)", mistake(path))


def test_links_and_devices_in_a_tar_are_no_data(tmp_path):
    write_tar(tmp_path / "a.tar", examples(pictures(4), LABELS[:4]))
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert len(folder.find(folder_config(tmp_path / "a.tar").data).names) == 4


def test_what_is_no_file_among_tars_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    assert re.search(r"a\.tar: it is not a file", mistake(tmp_path))


def test_a_packed_tar_is_explained(tmp_path):
    write_tar(tmp_path / "a.tar.gz", examples(pictures(4), LABELS[:4]))
    assert "a packed tar file cannot be read at random: unpack it" in mistake(tmp_path / "a.tar.gz")


@pytest.mark.parametrize(
    "kind, content, words",
    [
        ("cls", b"-1", "'-1' is no class's number"),
        ("cls", b"7" * 99, "7777.* is no class's number"),
        ("cls", b"\xff", "codec can't decode"),
        ("json", b'{"label": [1]}', r"\[1\] is no class's number"),
        ("json", b'{"label": true}', "True is no class's number"),
        ("json", b"[" * 10**5, "no JSON|Expecting|recursion"),
        ("json", b" " * (2**20 + 1), "larger than 1 MiB"),
    ],
)
def test_labels_of_a_tar_that_are_none(tmp_path, kind, content, words):
    files = examples(pictures(4), LABELS[:4], kind=kind)
    write_tar(tmp_path / "a.tar", files | {f"000002.{kind}": content})
    assert re.search(words, mistake(tmp_path / "a.tar", num_classes=10))


def test_labels_of_a_tar_that_are_names(tmp_path):
    names = ["b10", "b9", "a", "a"]
    write_tar(tmp_path / "a.tar", examples(pictures(4), names))
    assert datasets.Data(
        folder_config(tmp_path / "a.tar", num_classes=3).data
    ).identity.classes == (
        "a",
        "b9",
        "b10",
    )


def test_tars_are_known_again(tmp_path):
    files = examples(pictures(12), LABELS)
    write_tar(tmp_path / "a.tar", files)
    before = identity(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", files)
    assert identity(tmp_path / "a.tar") == before
    names = identity(tmp_path / "a.tar", digest="names")
    write_tar(tmp_path / "a.tar", files | {"000002.png": files["000003.png"]})
    assert identity(tmp_path / "a.tar") != before
    assert identity(tmp_path / "a.tar", digest="names").train == names.train


def test_headers_of_a_large_tar_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tars, "LARGE", 1)
    monkeypatch.setattr(tars, "FRESH", -(10**12))
    scans, scan = [], tars._scan
    monkeypatch.setattr(tars, "_scan", lambda path: scans.append(path.name) or scan(path))
    path = tmp_path / "a.tar"
    files = {f"ü{'x' * (150 * k)}\udce9.png": bytes(k) for k in range(1, 4)}
    write_tar(path, files)
    first = tars.members(path)
    assert [*map(len, files.values())] == [size for _, size in first[1]]
    assert tars.members(path) == first and first[0] == [*files] and scans == ["a.tar"]
    (cache,) = (tmp_path / "cache/pfgm").iterdir()
    cache.write_bytes(b"damaged")
    assert tars.members(path) == first and len(scans) == 2
    write_tar(path, dict(reversed(files.items())))
    assert tars.members(path)[0] == [*reversed(files)] and len(scans) == 3
    write_tar(path, {})
    assert [*map(len, tars.members(path))] == [0, 0] == [*map(len, tars.members(path))]


def test_a_worker_of_a_tar_needs_no_listing(tmp_path):
    write_tar(tmp_path / "a.tar", examples(pictures(12), LABELS))
    store = folder.find(folder_config(tmp_path / "a.tar").data)._store
    assert {*store.__getstate__()} == {"_shards", "_place"}
    path = next(iter(store.listing.files.values()))
    assert pickle.loads(pickle.dumps(store)).open(path).read() == store.open(path).read()


# --- parquet --------------------------------------------------------------------------------------


@pytest.fixture
def arrow(monkeypatch):
    """pyarrow, or what stands for it in tests where it cannot be imported."""
    if not has_pyarrow():
        fake_pyarrow.install(monkeypatch)


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path, arrow, struct):
    images = pictures(12)
    write_parquet(tmp_path / "a.parquet", images, LABELS, NAMES, struct=struct)
    contents = {}
    for split in datasets.SPLITS:
        pixels, labels = read(tmp_path / "a.parquet", split)
        contents |= {p.tobytes(): int(label) for p, label in zip(pixels, labels, strict=True)}
    assert contents == {i.tobytes(): label for i, label in zip(images, LABELS, strict=True)}
    data = datasets.Data(folder_config(tmp_path / "a.parquet", num_classes=10).data)
    assert data.get("train").names == NAMES


def test_parquet_files_of_hugging_face(tmp_path, arrow):
    """A folder as its hub has them: data/train-00000-of-00002.parquet."""
    images = pictures(12)
    for number, name in enumerate(
        ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    ):
        part = slice(4 * number, 4 * number + 4)
        write_parquet(tmp_path / f"x/data/{name}.parquet", images[part], LABELS[part], NAMES)
    for split, part in (("train", slice(8)), ("test", slice(8, 12))):
        pixels, labels = read(tmp_path / "x", split)
        np.testing.assert_array_equal(pixels, images[part])
        assert labels.tolist() == LABELS[part]


def test_parquet_of_a_test_split_without_labels(tmp_path, arrow):
    images = pictures(8)
    write_parquet(tmp_path / "x/train-0.parquet", images[:4], LABELS[:4], NAMES)
    write_parquet(tmp_path / "x/test-0.parquet", images[4:])
    data = datasets.Data(folder_config(tmp_path / "x", num_classes=-1).data)
    assert data.labels("train").tolist() == LABELS[:4]
    assert not data.has_labels("test")


def test_parquet_with_more_rows_than_bytes(tmp_path, arrow, monkeypatch):
    write_parquet(tmp_path / "a.parquet", pictures(4))
    with open(tmp_path / "a.parquet", "rb") as file:
        content = parquet.parquet().ParquetFile(file)
    group = types.SimpleNamespace(num_rows=10**11, total_byte_size=1)
    claims = types.SimpleNamespace(num_row_groups=1, row_group=lambda i: group)
    claiming = types.SimpleNamespace(metadata=claims, schema_arrow=content.schema_arrow)
    monkeypatch.setattr(parquet.parquet(), "ParquetFile", lambda file: claiming)
    assert "it says that it has more rows than bytes" in mistake(tmp_path / "a.parquet")


def test_parquet_without_what_is_needed(tmp_path, arrow):
    write_parquet(tmp_path / "a.parquet", pictures(4))
    assert "4 of 4 images" in mistake(tmp_path / "a.parquet", num_classes=2)
    content = (tmp_path / "a.parquet").read_bytes()
    for number, damaged in enumerate((content[:-20], content[:8], b"PAR1" + bytes(64))):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(damaged)
        assert f"{number}.parquet cannot be read as a parquet file" in mistake(path)


def test_a_row_group_that_claims_to_be_large_is_not_read(tmp_path, arrow, monkeypatch):
    write_parquet(tmp_path / "a.parquet", pictures(4))
    monkeypatch.setattr(parquet, "may_unpack_to", lambda size: 100)
    assert "a row group of it unpacks to a hundred times its size" in mistake(
        tmp_path / "a.parquet"
    )


def test_row_groups_are_read_once_in_order(tmp_path, arrow):
    write_parquet(tmp_path / "a.parquet", pictures(12), rows=3)
    store = folder.find(folder_config(tmp_path / "a.parquet").data)._store
    for i, path in enumerate(store.listing.files.values()):
        group = store._group(0, i // 3)
        store.open(path)
        assert store._group(0, i // 3) is group
    assert pickle.loads(pickle.dumps(store)).open(path).read() == store.open(path).read()


@pytest.mark.parametrize(("most_bytes", "again"), [(0, [0, 2, 3]), (2**28, [])])
def test_a_batch_reads_each_row_group_once(tmp_path, arrow, monkeypatch, most_bytes, again):
    """Another batch reads it again, unless all groups fit in memory."""
    groups = []

    class Counting(parquet.parquet().ParquetFile):
        def read_row_group(self, group, columns):
            groups.append(group)
            return super().read_row_group(group, columns=columns)

    monkeypatch.setattr(parquet, "MOST_BYTES", most_bytes)
    monkeypatch.setattr(parquet.parquet(), "ParquetFile", Counting)
    images = pictures(12)
    write_parquet(tmp_path / "a.parquet", images, rows=3)
    config = folder_config(tmp_path / "a.parquet", resident_bytes=0, held_out=0)
    data = datasets.Data(config.data).get("train")
    index = np.array([11, 0, 7, 1, 10, 0, 6, 2])
    for _ in range(2):
        groups.clear()
        batch = data.batch(torch.from_numpy(index)).images.permute(0, 2, 3, 1)
        np.testing.assert_array_equal(batch, images[index])
        assert len({*groups}) == len(groups)
    assert groups == again


def test_columns_of_images():
    """A column of images has a known name, or is the only one; a structure needs `bytes`."""

    def column(**kinds):
        fields = [
            types.SimpleNamespace(name=n, type=fake_pyarrow.Type(k)) for n, k in kinds.items()
        ]
        return parquet._column_of_images(fake_pyarrow.Schema(fields))

    whole = "struct<bytes: binary, path: string>"
    assert column(mask=whole, image=whole, label="int64") == "image.bytes"
    assert column(photo="large_binary", text="string") == "photo"
    assert column(photo="binary", png="binary") == "png"
    for kinds in ({"text": "string"}, {"a": "binary", "b": "binary"}, {"list": "list<binary>"}):
        with pytest.raises(ValueError, match="no column of images, such as image; it has"):
            column(**kinds)


def test_parquet_files_are_known_again(tmp_path, arrow):
    images = pictures(12)
    write_parquet(tmp_path / "a.parquet", images, LABELS)
    before = identity(tmp_path / "a.parquet")
    assert identity(tmp_path / "a.parquet") == before
    images[3, 0, 0, 0] ^= 1
    write_parquet(tmp_path / "a.parquet", images, LABELS)
    assert identity(tmp_path / "a.parquet") != before


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert mistake(tmp_path / "a.parquet").startswith(
        "parquet files are read by pyarrow: pip install pyarrow ("
    )
    assert parquet.START == b"PAR1"


# --- folders with something of each ---------------------------------------------------------------


def test_a_folder_of_images_stays_one(tmp_path):
    """Archives and other files beside the images are left out."""
    write_tree(tmp_path, pictures(4))
    write_tar(tmp_path / "a.tar", examples(pictures(4), LABELS[:4]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"")
    data = folder.find(folder_config(tmp_path).data)
    assert len(data.names) == 4
    assert data.omitted == "1 .tar, 1 file without a suffix"


def test_headers_of_a_tar_are_read_in_pieces():
    with pytest.raises(ValueError, match="a header takes 1,048,577 bytes"):
        tars._Headers(io.BytesIO()).read(2**20 + 1)
