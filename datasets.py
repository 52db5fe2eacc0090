"""Data sources with random access, and a deterministic stream of batches from them.

A data set is anything with `len()` whose indexing, by an integer tensor or a slice, gives uint8
images (k, C, H, W). Order and noise depend on (seed, step) alone, so a stream can start anywhere.
"""

import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "test")


def keyed_seed(purpose: str, *key: int) -> int:
    """A 64-bit seed for `purpose` and the integers `key` (each >= 0), its own for each of them."""
    words = (zlib.crc32(purpose.encode()), len(key), *key)  # the length: (1,) is not (1, 0)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def keyed_generator(device: torch.device | str, purpose: str, *key: int) -> torch.Generator:
    """A generator on `device` that starts from `keyed_seed`."""
    return torch.Generator(device).manual_seed(keyed_seed(purpose, *key))


def digits(split: str) -> Tensor:
    """scikit-learn's 1,797 scanned digits, 8 x 8 grey: 1,617 to train, 180 to test on."""
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
    order = np.random.RandomState(0).permutation(len(images))
    held_out = round(len(images) / 10)
    return torch.from_numpy(images[order[held_out:] if split == "train" else order[:held_out]])


DATASETS: dict[str, Callable[[str], Tensor]] = {"digits": digits}


def get_dataset(config, split: str) -> Tensor:
    """The data that `config.data.dataset` names.

    Args:
        config: reads `data.dataset`, `data.image_size` and `data.num_channels`.
        split: "train" or "test".

    Returns:
        A uint8 data set with random access; see the module.

    Raises:
        ValueError: an unknown data set or split, or images of another shape than configured.
    """
    name = config.data.dataset.lower()
    if name not in DATASETS:
        raise ValueError(
            f"unknown data set data.dataset={config.data.dataset!r}; known: {', '.join(DATASETS)}"
        )
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    data = DATASETS[name](split)
    expected = (config.data.num_channels, config.data.image_size, config.data.image_size)
    if tuple(data[0].shape) != expected:
        raise ValueError(
            f"{name} images are {tuple(data[0].shape)} (C, H, W), but data.num_channels and "
            f"data.image_size say {expected}"
        )
    return data


def get_data_scaler(config) -> Callable[[Tensor], Tensor]:
    """From [0, 1] to what the network sees: [-1, 1] with `data.centered`, else unchanged."""
    return (lambda x: 2 * x - 1) if config.data.centered else (lambda x: x)


def get_data_inverse_scaler(config) -> Callable[[Tensor], Tensor]:
    """The inverse of `get_data_scaler`."""
    return (lambda x: (x + 1) / 2) if config.data.centered else (lambda x: x)


def shuffled_batches(data: Tensor, batch_size: int, seed: int, step: int = 0) -> Iterator[Tensor]:
    """Endless uint8 batches (B, C, H, W) from batch number `step` on.

    Every epoch is a permutation given by (seed, epoch); a batch that crosses its end goes on in the
    next one, so that no image is left out. B is `batch_size`, or the whole data set where that is
    smaller.
    """
    n = len(data)
    size = min(batch_size, n)
    orders: dict[int, Tensor] = {}
    while True:
        first, last = divmod(step * size, n), divmod((step + 1) * size, n)
        epochs = range(first[0], last[0] + 1)
        orders = {e: orders[e] if e in orders else _order(n, seed, e) for e in epochs}
        start = first[1]
        yield data[torch.cat(list(orders.values()))[start : start + size]]
        step += 1


def _order(n: int, seed: int, epoch: int) -> Tensor:
    order = np.random.default_rng(keyed_seed("order", seed, epoch)).permutation(n)
    return torch.from_numpy(order)


def to_unit_interval(
    images: Tensor,
    generator: torch.Generator | None = None,
    flip: bool = False,
    dequantize: bool = False,
) -> Tensor:
    """Float images (B, C, H, W) in [0, 1] from uint8 ones, on their device.

    Args:
        images: uint8, (B, C, H, W).
        generator: source of the random choices.
        flip: mirror each image left to right with probability 1/2.
        dequantize: add uniform noise within a grey level, (images + u) / 256; the density of
            such data bounds the likelihood of the discrete ones (Theis et al. 2016).
    """
    draw = {"generator": generator, "device": images.device}
    if flip:
        mirrored = torch.rand(len(images), 1, 1, 1, **draw) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    if dequantize:
        return (images + torch.rand(images.shape, **draw)) / 256
    return images / 255
