"""Order, coverage and range of what training and evaluation read."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import datasets
from configs.poisson import digits_ddpmpp


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
    for epoch in torch.cat(stream)[: 3 * n].split(n):
        assert epoch.sort().values.tolist() == list(range(n))
    resumed = list(islice(datasets.shuffled_batches(data, batch_size, seed, start), count))
    assert torch.equal(torch.cat(resumed), torch.cat(stream[start:]))


def test_epochs_and_seeds_differ():
    data = torch.arange(100, dtype=torch.uint8)
    first, second = islice(datasets.shuffled_batches(data, 100, seed=0), 2)
    (other,) = islice(datasets.shuffled_batches(data, 100, seed=1), 1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_keyed_generators_repeat_and_differ():
    def draw(*key):
        return torch.rand(4, generator=datasets.keyed_generator("cpu", *key))

    assert torch.equal(draw("noise", 1, 2), draw("noise", 1, 2))
    others = [draw("noise", 1), draw("noise", 1, 0), draw("noise", 0, 1), draw("order", 1)]
    for i, other in enumerate(others):
        assert not any(torch.equal(other, another) for another in others[:i])


def test_floats_are_in_the_unit_interval():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    plain = datasets.to_unit_interval(images)
    assert plain.min() == 0
    assert plain.max() == 1
    noisy = datasets.to_unit_interval(
        images.expand(50, 1, 16, 16), torch.Generator().manual_seed(0), dequantize=True
    )
    assert torch.equal((noisy * 256).floor(), images.float().expand_as(noisy))  # within its level
    within = (noisy * 256) % 1
    assert abs(within.mean() - 0.5) < 0.01
    assert abs(within.var() - 1 / 12) < 0.01


def test_half_of_the_images_are_mirrored():
    images = torch.arange(8, dtype=torch.uint8).view(1, 1, 1, 8).expand(2000, 1, 8, 8)
    out = datasets.to_unit_interval(images, torch.Generator().manual_seed(0), flip=True)
    straight, mirrored = images[0] / 255, images[0].flip(-1) / 255
    is_mirrored = torch.tensor([torch.equal(image, mirrored) for image in out])
    assert all(m or torch.equal(image, straight) for m, image in zip(is_mirrored, out, strict=True))
    assert 900 < is_mirrored.sum() < 1100


@pytest.mark.parametrize("centered, low, high", [(True, -1, 1), (False, 0, 1)])
def test_scalers_are_inverse(centered, low, high):
    config = digits_ddpmpp.get_config()
    config.data.centered = centered
    x = torch.tensor([0.0, 0.25, 1.0])
    scaled = datasets.get_data_scaler(config)(x)
    assert (scaled.min(), scaled.max()) == (low, high)
    assert torch.equal(datasets.get_data_inverse_scaler(config)(scaled), x)


def test_mistakes_are_named():
    config = digits_ddpmpp.get_config()
    with pytest.raises(ValueError, match="unknown split 'validation'; known: train, test"):
        datasets.get_dataset(config, "validation")
    config.data.image_size = 16
    with pytest.raises(ValueError, match=r"digits images are \(1, 8, 8\).*\(1, 16, 16\)"):
        datasets.get_dataset(config, "train")
    config.data.dataset = "digit"
    with pytest.raises(ValueError, match=r"data\.dataset='digit'; known: digits"):
        datasets.get_dataset(config, "train")
