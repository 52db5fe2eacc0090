"""Measure images a second, from memory and from a zip of PNGs, against the obvious loop.

    python3 benchmarks/data.py [--batch 4096] [--rounds 7] [--workers 2]

The time is that of a training step's input: a shuffled batch of 32 x 32 x 3 images, half of them
mirrored, as floats in [0, 1]. The obvious loops fetch (or decode), convert and mirror image by
image and stack them. Both run in turn.
"""

import io
import itertools
import statistics
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import datasets
from configs.default import get_default_config
from sources.codec import EightBitImages
from sources.preparation import mirrored

RESIDENT, ON_DISK = 50_000, 20_000  # images
COUNTED = 8  # batches of ours in a round


def write_zip(path: Path) -> None:
    """Write PNGs of smooth random images, about as large as those of photographs."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for i in range(ON_DISK):
            image = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            encoded = io.BytesIO()
            image.resize((32, 32)).save(encoded, "png")
            file.writestr(f"{i // 1000}/{i:05d}.png", encoded.getvalue())


def ours(data, batch: int) -> Iterator[Tensor]:
    generator, codec = torch.Generator().manual_seed(0), EightBitImages((3, 32, 32))
    for rows in datasets.shuffled_batches(data, batch, seed=0):
        yield codec.units(mirrored(rows.images, generator))


def obvious(read: Callable[[int], Tensor], n: int, batch: int) -> Iterator[Tensor]:
    while True:
        for index in torch.randperm(n).split(batch):
            images = [read(i).float() / 255 for i in index.tolist()]
            yield torch.stack([x.flip(-1) if torch.rand(()) < 0.5 else x for x in images])


def png_reader(path: Path) -> Callable[[int], Tensor]:
    file = zipfile.ZipFile(path)
    names = file.namelist()

    def read(i: int) -> Tensor:
        with file.open(names[i]) as entry:
            return torch.from_numpy(np.array(Image.open(entry))).permute(2, 0, 1)

    return read


def main() -> None:
    options = common.options(__doc__, batch=4096, rounds=7, workers=2)
    batch, workers = options.batch, options.workers
    print(
        f"batch {batch}, 32 x 32 x 3, {workers} workers, {common.setting()}; "
        f"medians of {options.rounds}"
    )
    columns = ("images/s", ">12,.0f"), ("obvious loop", ">14,.0f"), ("ratio", ">8.1f")
    table = common.Table(("data", "<22"), *columns)

    def compare(name: str, ahead: int, a: Iterator[Tensor], b: Iterator[Tensor]) -> None:
        """Adds a row; the batches of `a` that were decoded ahead of a round do not count."""
        next(a), next(b)  # processes start
        times = []
        for _ in range(options.rounds):
            plain = common.seconds(lambda: next(b))
            list(itertools.islice(a, ahead))
            times.append((common.seconds(lambda: list(itertools.islice(a, COUNTED))), plain))
        ours_time, plain_time = (statistics.median(column) for column in zip(*times, strict=True))
        rates = COUNTED * batch / ours_time, batch / plain_time
        table.row(name, *rates, rates[0] / rates[1])

    resident = torch.randint(0, 256, (RESIDENT, 3, 32, 32), dtype=torch.uint8)
    plain = obvious(resident.__getitem__, RESIDENT, batch)
    compare("in memory", 0, ours(resident, batch), plain)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.zip"
        write_zip(path)
        config = get_default_config()
        config.data.update(dataset="folder", path=str(path), resident_bytes=0, num_workers=workers)
        stream = ours(datasets.get_dataset(config, "train"), batch)
        ahead = 2 * workers  # as DataLoader does by default
        compare("from a zip of PNGs", ahead, stream, obvious(png_reader(path), ON_DISK, batch))


if __name__ == "__main__":
    main()
