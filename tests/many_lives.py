"""Trains or evaluates in many lives, each a process that is killed at a random moment.

    python3 tests/many_lives.py train|eval WORKDIR LIVES [--config.section.key=JSON ...]

Every life is a fork of this process, which has imported everything and started no thread, so that
it costs its steps only. In turn a life is killed at a random time after its start, after the first
thing it saved, and while it writes a file. Prints, as JSON, how many left a file half written.
Evaluation writes to the folder `killed`.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (the optimizer's, which each life would import)

import datasets  # noqa: E402
import run_lib  # noqa: E402
from configs.poisson import digits_ddpmpp  # noqa: E402

OVERRIDES = {
    "training.n_iters": 10**6,  # no life reaches it
    "training.batch_size": 64,
    "training.small_batch_size": 8,
    "training.log_freq": 5,
    "training.eval_freq": 50,
    "training.snapshot_freq": 5,
    "training.snapshot_freq_for_preemption": 3,
    "training.snapshot_sampling": False,
    "data.random_flip": True,
    "data.uniform_dequantization": True,
    "optim.warmup": 20,
    "optim.cooldown": 0,
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.dropout": 0.1,
}


def small_config(**overrides):
    """A run of the digits whose step takes milliseconds, with every source of randomness in it."""
    config = digits_ddpmpp.get_config()
    config.update_from_flattened_dict(OVERRIDES | overrides)
    return config


def live(mode: str, config, workdir: Path) -> int:
    """Starts a process that trains or evaluates; returns its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)  # the progress bar
        if mode == "train":
            run_lib.train(config, workdir)
        else:
            run_lib.evaluate(config, workdir, "killed")
        status = 0
    finally:
        os._exit(status)


def main(mode: str, workdir: Path, lives: int, overrides: dict) -> None:
    config = small_config(**overrides)
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    run_lib.Experiment.build(config)  # imports the rest
    datasets.get_dataset(config, "train")
    pace = {"train": 0.2, "eval": 0.05}[mode]  # seconds that a life may last beyond its first save
    pattern = {"train": "checkpoints*/", "eval": "killed/**/"}[mode]
    chance = random.Random(0)
    writing = 0

    def half_written() -> list[Path]:
        return list(workdir.glob(f"{pattern}.*.partial"))

    def saved() -> int:
        """Measure of progress that grows with every saved file."""
        total = 0
        for path in workdir.glob(f"{pattern}[!.]*"):
            with contextlib.suppress(FileNotFoundError):  # renamed since it was listed
                total += path.stat().st_mtime_ns if path.is_file() else 0
        return total

    for life in range(lives):
        for leftover in half_written():
            leftover.unlink()  # the next one seen is of this life
        before = saved()
        process = live(mode, config, workdir)

        def wait_for(event, process=process):
            while not event() and not os.waitpid(process, os.WNOHANG)[0]:
                time.sleep(1e-3)

        if life % 3 == 0:
            time.sleep(chance.uniform(0, 2 * pace))
        else:
            wait_for(lambda before=before: saved() != before)
            time.sleep(chance.uniform(0, pace))
            if life % 3 == 2:
                wait_for(half_written)
                time.sleep(chance.uniform(0, pace / 50))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise RuntimeError(f"life {life} ended by itself, with status {status}")
        writing += bool(half_written())
    print(json.dumps({"half written": writing}))


if __name__ == "__main__":
    pairs = (argument.removeprefix("--config.").split("=", 1) for argument in sys.argv[4:])
    changes = {key: json.loads(value) for key, value in pairs}
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), changes)
