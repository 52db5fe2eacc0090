"""Measure the time of saving and loading a checkpoint, and what saving costs a training.

    python3 benchmarks/checkpoints.py [--config configs/poisson/digits_ddpmpp.py] [--images N]
                                      [--rounds 15] [--folder DIR]

Saving is compared with torch.save in place, whose file a kill or a power cut can leave half
written; a save of this program is also flushed to the disk, with its folder's entry, and read back
against its checksums. Loading is compared with torch.load, which compares no checksums. Then 30
steps are timed until everything is written: without a checkpoint, with one for which training
waits, and with one that a thread writes. A step has N random images, by default as many as the
config says.
"""

import hashlib
import runpy
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import torch

from experiment import Experiment
from sources.batch import Batch
from storage.checkpoint_writer import CheckpointWriter
from storage.checkpoints import _check_records, load_checkpoint
from storage.files import atomic_write
from storage.run_checkpoints import save_state
from training import TrainState, train_step

STEPS, SAVED_AFTER = 30, 10
DIGESTS = {"CRC-32": zlib.crc32, "SHA-256": hashlib.sha256, "BLAKE2b": hashlib.blake2b}


def steps_with(step: Callable, save: Callable, finish: Callable) -> None:
    """Take `STEPS` steps with a `save` among them; `finish` waits for it at their end."""
    for number in range(1, STEPS + 1):
        step()
        if number == SAVED_AFTER:
            save()
    finish()


def nothing() -> None:
    """Do nothing, in place of a save."""


def main() -> None:
    defaults = {"config": "configs/poisson/digits_ddpmpp.py", "folder": tempfile.gettempdir()}
    options = common.options(__doc__, **defaults, images=0, rounds=15)
    config = runpy.run_path(options.config)["get_config"]()
    if options.images:
        config.training.update(batch_size=options.images, small_batch_size=0)
    run = Experiment.build(config)
    trained = TrainState.from_config(config, run.network, run.objective)
    batch = Batch(torch.rand(config.training.batch_size, *run.codec.shape, device=run.device))

    def step() -> None:
        train_step(trained, batch).item()

    step()
    state = trained.state_dict() | {"written": []}
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        CheckpointWriter(run.device) as writer,
    ):
        folder = Path(name)
        path = folder / "plain.pth"

        def check() -> None:
            with open(path, "rb") as file:
                _check_records(file)

        def flush() -> None:
            with atomic_write(folder / "bytes") as file:
                file.write(content)

        def save() -> None:
            save_state(folder, state)

        def write() -> None:
            trained.copied = writer.save(state, partial(save_state, folder))

        torch.save(state, path)
        content = path.read_bytes()
        actions = {
            "training step": step,
            "torch.save in place": lambda: torch.save(state, path),
            "the same bytes, flushed and renamed": flush,
            "reading back against the checksums": check,
            "looking for weights that are not finite": trained.is_finite,
            "save": save,
            "the same in a thread, until training goes on": write,
            "torch.load": lambda: torch.load(path, map_location="cpu", weights_only=True),
            "load": lambda: load_checkpoint(path),
        }
        times = dict(
            zip(actions, common.medians(*actions.values(), rounds=options.rounds), strict=True)
        )
        plain = {"save": times["torch.save in place"], "load": times["torch.load"]}
        print(f"{options.config}, {common.setting(run.device)}; {options.rounds} rounds, medians")
        table = common.Table((f"checkpoint of {len(content) / 1e6:.1f} MB", "<48"), ("ms", ">9.2f"))
        for action, seconds in times.items():
            if action in plain:
                action += f", {seconds / plain[action]:.2f} times the plain one"
            table.row(action, 1e3 * seconds)

        loops = {
            "without a checkpoint": lambda: steps_with(step, nothing, nothing),
            "with one, for which it waits": lambda: steps_with(step, save, nothing),
            "with one that a thread writes": lambda: steps_with(step, write, writer.wait),
        }
        rounds = max(3, options.rounds // 5)
        table = common.Table((f"{STEPS} steps", "<48"), ("s", ">9.2f"), ("more", ">7.1%"))
        seconds = common.medians(*loops.values(), rounds=rounds)
        for loop, total in zip(loops, seconds, strict=True):
            table.row(loop, total, total / seconds[0] - 1)
    times = common.medians(
        *(lambda d=d: d(content) for d in DIGESTS.values()), rounds=options.rounds
    )
    table = common.Table(("checksum", "<10"), ("GB/s", ">6.1f"))
    for name, seconds in zip(DIGESTS, times, strict=True):
        table.row(name, len(content) / seconds / 1e9)


if __name__ == "__main__":
    main()
