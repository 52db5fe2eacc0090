"""Images a second from memory and from a zip of PNGs, against the obvious loop, turn by turn.

    python3 benchmarks/data.py [--batch 4096] [--rounds 7]

Counted is what a training step waits for: a shuffled batch of 32 x 32 x 3 images, half of them
mirrored, as floats in [0, 1]. The obvious loops fetch (or decode), convert and mirror image by
image and stack them.
"""

import argparse
import io
import itertools
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import datasets  # noqa: E402

RESIDENT, ON_DISK = 50_000, 20_000  # images


def write_zip(path: Path) -> None:
    """PNGs of smooth random images, about as large as those of photographs."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for i in range(ON_DISK):
            image = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            encoded = io.BytesIO()
            image.resize((32, 32)).save(encoded, "png")
            file.writestr(f"{i // 1000}/{i:05d}.png", encoded.getvalue())


def ours(data, batch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for found in datasets.shuffled_batches(data, batch, seed=0):
        yield datasets.to_unit_interval(found.images, generator, flip=True)


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


def seconds(batches: Iterator[Tensor], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - start) / count


def compare(name: str, batch: int, rounds: int, ahead: int, a: Iterator, b: Iterator) -> None:
    """Prints images a second of both; the batches of `a` decoded ahead of a round do not count."""
    next(a), next(b)  # processes start
    times = []
    for _ in range(rounds):
        plain = seconds(b, 1)
        list(itertools.islice(a, ahead))
        times.append((seconds(a, 8), plain))
    ours, plain = (batch / statistics.median(column) for column in zip(*times, strict=True))
    print(f"{name:<22}{ours:>12,.0f}{plain:>14,.0f}{ours / plain:>8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    batch, rounds = options.batch, options.rounds
    print(
        f"batch {batch}, 32 x 32 x 3, {options.workers} workers, {torch.get_num_threads()} threads"
        f", torch {torch.__version__}; medians of {rounds}"
    )
    print(f"{'':<22}{'images/s':>12}{'obvious loop':>14}{'ratio':>8}")
    resident = torch.randint(0, 256, (RESIDENT, 3, 32, 32), dtype=torch.uint8)
    plain = obvious(resident.__getitem__, RESIDENT, batch)
    compare("in memory", batch, rounds, 0, ours(resident, batch), plain)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.zip"
        write_zip(path)
        config = ConfigDict({"data": {"dataset": "folder", "path": str(path), "image_size": 32}})
        config.data.update(num_channels=3, resident_bytes=0, num_workers=options.workers)
        stream = datasets.get_dataset(config, "train")
        plain = obvious(png_reader(path), ON_DISK, batch)
        ahead = 2 * options.workers  # as DataLoader does by default
        compare("from a zip of PNGs", batch, rounds, ahead, ours(stream, batch), plain)


if __name__ == "__main__":
    main()
