"""Latents of training images, which are computed once and kept for later starts."""

import fcntl
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from execution import full_float32
from sources import digests
from sources.autoencoder import AT_ONCE
from sources.base import Source
from sources.latents import Latents
from sources.npy import StoredArray
from sources.stream import DataSet, Stream, in_order
from storage.files import atomic_write, open_regular

log = logging.getLogger(__name__)

Shape = tuple[int, ...]


def cached_latents(
    images: DataSet, digest: str, codec: Latents, mirrored: bool, device: torch.device | str
) -> Source:
    """The latents of `encoded_once`, in a file of the cache; `digest` is that of the `images`."""
    name = digests.joined(digest, codec.unscaled_identity, str(mirrored))[:32]
    path = digests.cache_path(Path(), f"latents-{name}.npy")
    with full_float32():
        return encoded_once(images, codec, mirrored, path, device)


def encoded_once(
    images: DataSet, codec: Latents, mirrored: bool, path: Path, device: torch.device | str
) -> Source:
    """Latents of `images`, before they are scaled, float32 (h, w, c), in the order of the images.

    Where `mirrored`, each latent is followed by that of the mirror image. They are read from the
    file at `path`, which is written first if it is missing. Where it cannot be written, they are
    held in memory, and a line of the log says so.

    Raises ValueError where an image on disk cannot be read, or as `Autoencoder.encode`.
    """
    channels, *sides = codec.shape
    shape = (len(images) * (1 + mirrored), *sides, channels)
    if (array := _opened(path, shape)) is not None:
        return array
    try:
        if not path.is_absolute():
            raise FileNotFoundError("there is no home folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_regular(path.with_suffix(".lock"), "ab", follow=False) as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # only one of all processes and runs writes the file
            if _opened(path, shape) is None:
                _write(path, shape, _batches(images, codec, mirrored, device))
        return StoredArray.open(path)
    except OSError as error:
        log.warning(f"latents are held in memory, and computed again at the next start: {error}")
        return np.concatenate([*_batches(images, codec, mirrored, device)])


def _opened(path: Path, shape: Shape) -> StoredArray | None:
    """The array in the file at `path`; None where it is missing, damaged or of another shape."""
    try:
        array = StoredArray.open(path)
    except (OSError, ValueError):
        return None
    return array if (array.shape, array.dtype) == (shape, np.float32) else None


def _write(path: Path, shape: Shape, batches: Iterator[NDArray[np.float32]]) -> None:
    with atomic_write(path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for latents in batches:
            file.write(latents)
    log.info(f"latents: {path}, {4 * math.prod(shape) / 2**20:,.3g} MiB")


def _batches(
    images: DataSet, codec: Latents, mirrored: bool, device: torch.device | str
) -> Iterator[NDArray[np.float32]]:
    """Latents (k, h, w, c) of successive images."""
    at_once = max(1, AT_ONCE // math.prod(codec.data_shape))
    with tqdm(total=len(images), desc="encoding", unit="image", delay=1) as progress:
        for batch in in_order(images, at_once):
            if isinstance(images, Stream) and images.unreadable:  # other images replace them
                raise ValueError(
                    "data.codec: all images are encoded once, and one cannot be read; remove it: "
                    f"{next(iter(images.unreadable.values()))}"
                )
            stored = batch.images.to(device)
            versions = [stored, stored.flip(-1)][: 1 + mirrored]
            latents = torch.stack([codec.latents(codec.units(each)) for each in versions], 1)
            yield latents.flatten(0, 1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
            progress.update(len(batch))
