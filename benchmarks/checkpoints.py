"""What saving costs: seconds of a checkpoint, and their share of training at its frequency.

    python3 benchmarks/checkpoints.py [--config configs/poisson/digits_ddpmpp.py] [--folder DIR]

The plain way is torch.save in place, which a kill or a power cut can leave half written. A save
here is also flushed to the disk, with its folder's entry, and read back against its checksums.
"""

import argparse
import hashlib
import os
import runpy
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import datasets  # noqa: E402
from run_lib import Experiment  # noqa: E402
from sources.batch import Batch  # noqa: E402
from storage.checkpoints import _check_records, save_to_resume  # noqa: E402
from storage.files import atomic_write  # noqa: E402
from training import train_step  # noqa: E402

ROUNDS = 15


def median_seconds(*actions: Callable[[], object]) -> list[float]:
    """Of each of the actions, which are run turn by turn."""
    times = [[] for _ in actions]
    for _ in range(ROUNDS):
        for action, its in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            its.append(time.perf_counter() - start)
    return [statistics.median(its) for its in times]


def saves_of_a_run(training) -> int:
    """How many checkpoints a whole run writes, numbered ones and those to resume from."""
    n = training.n_iters
    numbered, overwritten = (
        {*range(frequency, n + 1, frequency), n}
        for frequency in (training.snapshot_freq, training.snapshot_freq_for_preemption)
    )
    return len(numbered) + len(numbered | overwritten)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/poisson/digits_ddpmpp.py")
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    config = runpy.run_path(arguments.config)["get_config"]()
    run = Experiment.build(config)
    images = datasets.get_dataset(config, "train")[: config.training.batch_size].to(run.device)
    batch = Batch(run.scaler(datasets.to_unit_interval(images)))

    def step() -> None:
        train_step(run.state, run.loss, batch).item()

    step()
    state = run.state.state_dict()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "plain.pth"

        def check() -> None:
            with open(path, "rb") as file:
                _check_records(file)

        def fsync() -> None:
            with atomic_write(Path(folder) / "bytes") as file:
                file.write(content)

        torch.save(state, path)
        content = path.read_bytes()
        step_s, finite_s, plain_s, check_s, flushed_s, save_s = median_seconds(
            step,
            run.state.is_finite,
            lambda: torch.save(state, path),
            check,
            fsync,
            lambda: save_to_resume(Path(folder), state),
        )
    print(f"{arguments.config}, {run.device}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"checkpoint of {len(content) / 1e6:.1f} MB; medians of {ROUNDS} rounds, in milliseconds")
    for name, seconds in (
        ("training step", step_s),
        ("torch.save in place", plain_s),
        ("the same bytes, flushed and renamed", flushed_s),
        ("reading back against the checksums", check_s),
        ("looking for weights that are not finite", finite_s),
        (f"a save as it is, {save_s / plain_s:.2f} times the plain one", save_s + finite_s),
    ):
        print(f"  {name:<48}{1e3 * seconds:>9.2f}")
    number, n_iters = saves_of_a_run(config.training), config.training.n_iters
    share = number * (save_s + finite_s) / (n_iters * step_s)
    print(f"{number} saves in {n_iters} steps: {share:.2%} of the training time")
    for name, digest in (
        ("CRC-32", zlib.crc32),
        ("SHA-256", lambda b: hashlib.sha256(b).digest()),
        ("BLAKE2b", lambda b: hashlib.blake2b(b).digest()),
    ):
        (seconds,) = median_seconds(lambda digest=digest: digest(content))
        print(f"  {name:<10}{len(content) / seconds / 1e9:>6.1f} GB/s")


if __name__ == "__main__":
    main()
