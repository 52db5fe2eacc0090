"""Order, coverage and range of what training and evaluation read."""

import multiprocessing
import pickle
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from data_files import Dying, Interrupting, Numbers
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.utils.data import dataloader

import datasets
from configs.poisson import digits_ddpmpp
from sources import SOURCES, stream
from sources.base import Classes
from sources.batch import Batch, Conditions
from sources.codec import EightBitImages
from sources.codec import from_config as get_codec
from sources.preparation import Preparation, mirrored


def test_digits_are_split_without_overlap_or_loss():
    config = digits_ddpmpp.get_config()
    train, test = (datasets.get_dataset(config, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1617, 180)
    assert train.dtype == torch.uint8
    assert train.shape[1:] == (1, 8, 8)
    # every scan, once: compare as multisets with the grey levels of the source, 0 to 16
    levels = torch.cat([train, test]).flatten(1).double().mul(16 / 255).round().numpy()
    source = load_digits().data
    np.testing.assert_array_equal(
        levels[np.lexsort(levels.T[::-1])], source[np.lexsort(source.T[::-1])]
    )


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 60),
    start=st.integers(0, 50),
    seed=st.integers(0, 5),
)
def test_stream_covers_every_epoch_and_starts_anywhere(n, batch_size, start, seed):
    data = torch.arange(n, dtype=torch.uint8)
    size = min(batch_size, n)
    count = -(-3 * n // size)  # enough batches for three epochs
    stream = list(islice(datasets.shuffled_batches(data, batch_size, seed), start + count))
    assert all(len(batch) == size for batch in stream)
    images = torch.cat([batch.images for batch in stream])
    for epoch in images[: 3 * n].split(n):
        assert epoch.sort().values.tolist() == list(range(n))
    resumed = islice(datasets.shuffled_batches(data, batch_size, seed, start), count)
    assert torch.equal(torch.cat([batch.images for batch in resumed]), images[start * size :])


def test_epochs_and_seeds_differ():
    data = torch.arange(100, dtype=torch.uint8)
    first, second = islice(datasets.shuffled_batches(data, 100, seed=0), 2)
    (other,) = islice(datasets.shuffled_batches(data, 100, seed=1), 1)
    assert not torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)


def test_keyed_generators_repeat_and_differ():
    def draw(*key):
        return torch.rand(4, generator=datasets.keyed_generator("cpu", *key))

    assert torch.equal(draw("noise", 1, 2), draw("noise", 1, 2))
    others = [draw("noise", 1), draw("noise", 1, 0), draw("noise", 0, 1), draw("order", 1)]
    for i, other in enumerate(others):
        assert not any(torch.equal(other, another) for another in others[:i])


def test_floats_are_in_the_unit_interval():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    codec = EightBitImages((1, 16, 16))
    plain = codec.units(images)
    assert plain.min() == 0
    assert plain.max() == 1
    generator = torch.Generator().manual_seed(0)
    noisy = codec.dequantized(images.expand(50, 1, 16, 16), generator)
    assert torch.equal((noisy * 256).floor(), images.float().expand_as(noisy))  # within its level
    within = (noisy * 256) % 1
    assert abs(within.mean() - 0.5) < 0.01
    assert abs(within.var() - 1 / 12) < 0.01


def test_the_config_says_whether_training_images_are_dequantised():
    config = digits_ddpmpp.get_config()
    batch = Batch(torch.full((100, 1, 8, 8), 128, dtype=torch.uint8))
    for dequantises, ends in ((False, (128 / 255, 128 / 255)), (True, (128 / 256, 129 / 256))):
        config.data.uniform_dequantization = dequantises
        prepare = Preparation.from_config(config, get_codec(config), shared=False)
        data = (prepare(batch, torch.Generator().manual_seed(0)).images + 1) / 2
        assert (data.min().item(), data.max().item()) == pytest.approx(ends, abs=1e-5)


def test_half_of_the_images_are_mirrored():
    images = torch.arange(8, dtype=torch.uint8).view(1, 1, 1, 8).expand(2000, 1, 8, 8)
    for stored in (images, images.int(), images.double(), images > 2):
        out = mirrored(stored, torch.Generator().manual_seed(0))
        straight, other = stored[0], stored[0].flip(-1)
        is_other = torch.tensor([torch.equal(image, other) for image in out])
        assert all(torch.equal(image, straight) for image in out[~is_other])
        assert out.dtype == stored.dtype and 900 < is_other.sum() < 1100


@pytest.mark.parametrize("centered, low, high", [(True, -1, 1), (False, 0, 1)])
def test_a_codec_and_its_inverse(centered, low, high):
    config = digits_ddpmpp.get_config()
    config.data.centered = centered
    codec, x = get_codec(config), torch.tensor([0.0, 0.25, 1.0])
    scaled = codec.encode(x)
    assert (scaled.min(), scaled.max()) == codec.bounds == (low, high)
    assert torch.equal(codec.decode(scaled), x)
    beyond = torch.tensor([low - 1.0, high + 1.0])
    assert codec.decode(beyond).tolist() == [0, 1]
    torch.testing.assert_close(codec.encode(codec.unclamped(beyond)), beyond)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(codec.show(codec.encode(codec.units(levels))), levels)


def test_mistakes_are_named():
    config = digits_ddpmpp.get_config()
    with pytest.raises(ValueError, match="unknown split 'validation'; known: train, test"):
        datasets.get_dataset(config, "validation")
    config.data.image_size = 16
    with pytest.raises(ValueError, match=r"is \(1, 8, 8\).*say \(1, 16, 16\)"):
        datasets.get_dataset(config, "train")
    config.data.dataset = "digit"
    with pytest.raises(ValueError, match="data.dataset must be one of 'digits', .*, not 'digit'"):
        datasets.get_dataset(config, "train")


# --- data that stay on disk -----------------------------------------------------------------------


def first(stream, count):
    return torch.stack([batch.images for batch in islice(stream, count)])


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_give_what_tensors_give_before_and_after_a_resume(workers):
    resident = torch.arange(23, dtype=torch.uint8).view(-1, 1, 1, 1)
    stream = datasets.Stream(Numbers(23), (1, 1, 1), workers)
    expected = first(datasets.shuffled_batches(resident, 6, seed=3), 12)
    assert torch.equal(first(datasets.shuffled_batches(stream, 6, seed=3), 12), expected)
    resumed = first(datasets.shuffled_batches(stream, 6, seed=3, step=5), 7)
    assert torch.equal(resumed, expected[5:])
    for a, b in zip(datasets.in_order(stream, 6), resident.split(6), strict=True):
        assert torch.equal(a.images, b)
        assert a.labels is None
    assert torch.equal(stream[3:9], resident[3:9])


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_one_batch(workers):
    stream = datasets.Stream(Numbers(20), (1, 1, 1), workers)
    whole = first(datasets.shuffled_batches(stream, 6, seed=0), 8)
    shards = [
        first(datasets.shuffled_batches(stream, 6, seed=0, shard=(rank, 3)), 8) for rank in range(3)
    ]
    assert torch.equal(torch.cat(shards, dim=1), whole)
    with pytest.raises(ValueError, match="batch of 6 images cannot be shared equally by 4"):
        datasets.shuffled_batches(stream, 6, seed=0, shard=(0, 4))


def test_worker_processes_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    next(datasets.shuffled_batches(datasets.Stream(Numbers(9), (1, 1, 1), 1), 3, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next(workers, caplog):
    stream = datasets.Stream(Numbers(6, unreadable={2, 3, 5}), (1, 1, 1), workers)
    (batch,) = datasets.in_order(stream, 6)
    assert batch.images.flatten().tolist() == [0, 1, 4, 4, 4, 0]
    list(datasets.in_order(stream, 6))
    assert sorted(caplog.messages) == [f"unreadable image: image {i} is damaged" for i in (2, 3, 5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error(workers):
    stream = datasets.Stream(Numbers(6, unreadable=range(6)), (1, 1, 1), workers)
    with pytest.raises(ValueError, match="^6 images in a row cannot be used.*image . is damaged$"):
        next(datasets.in_order(stream, 3))
    assert not multiprocessing.active_children()  # while the error, which was caught, is there


def test_an_image_of_another_shape_is_not_used(caplog):
    images = [np.full((2, 2, 1), 7, np.uint8), np.zeros((2, 3, 1), np.uint8)]
    assert (datasets.Stream(images, (1, 2, 2))[:] == 7).all()
    assert re.search(r"number 1 is \(1, 2, 3\) .* say \(1, 2, 2\)", caplog.messages[0])


def test_resident_data_leave_the_unreadable_out(monkeypatch, caplog):
    bad = set(range(0, 60, 2))
    monkeypatch.setitem(datasets.sources.SOURCES, "numbers", lambda data, split: Numbers(60, bad))
    config = digits_ddpmpp.get_config()
    config.data.update({"dataset": "numbers", "image_size": 1})
    data = datasets.get_dataset(config, "train")
    assert data.flatten().tolist() == list(range(1, 60, 2))
    assert caplog.messages[-1] == "30 of 60 images are unreadable and left out"
    assert len(caplog.messages) == stream.MAX_NAMED + 2  # and that the others are not named


def test_channels_are_measured_over_the_whole_split(monkeypatch):
    indices = []

    class Watched(Numbers):
        def __getitem__(self, i):
            indices.append(i)
            return super().__getitem__(i)

    splits = {"train": Watched(200), "test": Numbers(2)}
    monkeypatch.setitem(datasets.sources.SOURCES, "mine", lambda data, split: splits[split])
    config = digits_ddpmpp.get_config()
    config.data.update({"dataset": "Mine", "image_size": 1, "num_channels": 0})
    assert datasets.Data(config.data).measure_channels() == 1
    assert len(set(indices)) == len(indices) == datasets.MEASURED
    assert (indices[0], indices[-1]) == (0, 199)
    assert max(np.diff(indices)) <= 4
    train, test = (datasets.get_dataset(config, split) for split in ("train", "test"))
    assert train.flatten().tolist() == list(range(200))
    config.data.num_channels = 1
    changed = Preparation.from_config(config, get_codec(config), False).words
    assert datasets.Data(config.data).describe(train, test, changed) == (
        "data: mine, 200 images to train on and 2 to test on, 1 x 1, 1 channel, "
        "not mirrored (data.random_flip)"
    )


def test_size_decides_what_stays_on_disk():
    config = digits_ddpmpp.get_config()
    config.data.resident_bytes = 1617 * 64
    resident = datasets.get_dataset(config, "train")
    config.data.resident_bytes -= 1
    config.data.num_workers = 0
    stream = datasets.get_dataset(config, "train")
    assert isinstance(resident, torch.Tensor)
    assert isinstance(stream, datasets.Stream)
    assert torch.equal(stream[:], resident)


def test_batches_go_on_without_dead_workers(caplog, monkeypatch):
    """A signal to the whole group ends the workers while the run has yet to save."""
    # DataLoader looks after its workers when none has answered for so long; 5 s by default
    looks = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(looks, "__defaults__", (0.2,))
    stream = datasets.Stream(Dying(8), (1, 1, 1), 2)
    batches = datasets.in_order(stream, 2)
    assert torch.cat([batch.images for batch in batches]).flatten().tolist() == list(range(8))
    assert "the processes that decode images died; going on without" in caplog.text


def test_ctrl_c_leaves_the_batches_to_come():
    (batch,) = datasets.in_order(datasets.Stream(Interrupting(4), (1, 1, 1), 1), 4)
    assert batch.images.flatten().tolist() == [0, 1, 2, 3]


ENDLESS = """
import multiprocessing
import sys
sys.path[:0] = sys.argv[1:]
import data_files
import datasets

if __name__ == "__main__":
    batches = datasets.shuffled_batches(datasets.Stream(data_files.Numbers(9), (1, 1, 1), 2), 3, 0)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_a_killed_run(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    run = subprocess.Popen(
        [sys.executable, script, ROOT, ROOT / "tests"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = [Path(f"/proc/{pid}") for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    assert all(worker.exists() for worker in workers)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 60
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)


def test_workers_get_the_source_and_no_conditions(monkeypatch):
    n = 10_000
    conditions = Conditions(class_labels=torch.arange(n))
    data, sent = datasets.Stream(Numbers(n), (1, 1, 1), 2, conditions), []

    def loader(reader, **more):
        sent.append(reader)
        return iter(())

    monkeypatch.setattr(stream, "DataLoader", loader)
    assert list(datasets.in_order(data, 8)) == []
    assert len(pickle.dumps(sent[0])) < n  # the labels take 8 n bytes
    assert sent[0][[3]][0].tolist() == data.read([3])[0].tolist()


def test_conditions_of_a_split_are_read_once(monkeypatch):
    """Conditions are read along with the images: no source is reopened, none stays open."""
    opened = []

    class Source(Numbers):
        def conditions(self):
            return {"vector": np.ones((12, 2), np.float32)}

        def classes(self):
            return Classes(np.arange(12) % 3, ())

    monkeypatch.setitem(SOURCES, "made", lambda data, split: opened.append(split) or Source(12))
    config = digits_ddpmpp.get_config()
    config.data.update(dataset="made", image_size=1, num_classes=3, conditions="vector")
    data = datasets.Data(config.data)
    images = data.get("train")
    conditions = data.conditions("train")
    assert opened == ["train"] and not data._sources
    assert [*conditions] == [*images.conditions] == ["vector", "class_labels"]
    assert all(torch.equal(conditions[name], images.conditions[name]) for name in conditions)
    assert [*data.conditions("train", labels=False)] == ["vector"]
    with pytest.raises(ValueError, match="gives no image"):
        config.data.conditions = "vector,image"
        data.conditions("train")
