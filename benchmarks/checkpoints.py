"""Measure the time of saving and loading a checkpoint, and the share of saving in training.

    python3 benchmarks/checkpoints.py [--config configs/poisson/digits_ddpmpp.py] [--folder DIR]

Saving is compared with torch.save in place, which a kill or a power cut can leave half written; a
save of this program is also flushed to the disk, with its folder's entry, and read back against its
checksums. Loading is compared with torch.load, which compares no checksums.
"""

import hashlib
import runpy
import tempfile
import zlib
from pathlib import Path

import common
import torch

from experiment import Experiment
from sources.batch import Batch
from storage.checkpoints import _check_records, load_checkpoint
from storage.files import atomic_write
from storage.run_checkpoints import save_to_resume
from training import TrainState, train_step

ROUNDS = 15
DIGESTS = {"CRC-32": zlib.crc32, "SHA-256": hashlib.sha256, "BLAKE2b": hashlib.blake2b}


def saves_of_a_run(training) -> int:
    """Number of checkpoints that a whole run writes, numbered ones and those to resume from."""
    n = training.n_iters
    numbered, overwritten = (
        {*range(frequency, n + 1, frequency), n}
        for frequency in (training.snapshot_freq, training.snapshot_freq_for_preemption)
    )
    return len(numbered) + len(numbered | overwritten)


def main() -> None:
    defaults = {"config": "configs/poisson/digits_ddpmpp.py", "folder": tempfile.gettempdir()}
    options = common.options(__doc__, **defaults)
    config = runpy.run_path(options.config)["get_config"]()
    run = Experiment.build(config)
    trained = TrainState.from_config(config, run.network, run.objective)
    images = run.data.get("train", labels=False)[: config.training.batch_size].to(run.device)
    batch = Batch(run.codec.encode(run.codec.units(images)))

    def step() -> None:
        train_step(trained, batch).item()

    step()
    state = trained.state_dict()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "plain.pth"

        def check() -> None:
            with open(path, "rb") as file:
                _check_records(file)

        def flush() -> None:
            with atomic_write(Path(folder) / "bytes") as file:
                file.write(content)

        torch.save(state, path)
        content = path.read_bytes()
        actions = {
            "training step": step,
            "torch.save in place": lambda: torch.save(state, path),
            "the same bytes, flushed and renamed": flush,
            "reading back against the checksums": check,
            "looking for weights that are not finite": trained.is_finite,
            "save": lambda: save_to_resume(Path(folder), state),
            "torch.load": lambda: torch.load(path, map_location="cpu", weights_only=True),
            "load": lambda: load_checkpoint(path),
        }
        times = common.medians(*actions.values(), rounds=ROUNDS)
    print(f"{options.config}, {common.setting(run.device)}; medians of {ROUNDS} rounds")
    table = common.Table((f"checkpoint of {len(content) / 1e6:.1f} MB", "<48"), ("ms", ">9.2f"))
    for name, seconds in zip(actions, times, strict=True):
        if name not in ("save", "load"):
            table.row(name, 1e3 * seconds)
    step_s, plain_s, *_, finite_s, save_s, plain_load_s, load_s = times
    table.row(f"a save, {save_s / plain_s:.2f} times the plain one", 1e3 * (save_s + finite_s))
    table.row(f"a load, {load_s / plain_load_s:.2f} times the plain one", 1e3 * load_s)
    number, n_iters = saves_of_a_run(config.training), config.training.n_iters
    share = number * (save_s + finite_s) / (n_iters * step_s)
    print(f"{number} saves in {n_iters} steps: {share:.2%} of the training time")
    times = common.medians(*(lambda d=d: d(content) for d in DIGESTS.values()), rounds=ROUNDS)
    table = common.Table(("checksum", "<10"), ("GB/s", ">6.1f"))
    for name, seconds in zip(DIGESTS, times, strict=True):
        table.row(name, len(content) / seconds / 1e9)


if __name__ == "__main__":
    main()
