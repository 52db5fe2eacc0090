"""Trains a workdir in many lives, each a process that is killed at a random moment.

    python3 tests/many_lives.py WORKDIR LIVES [--config.section.key=JSON ...]

Every life is a fork of this process, which has imported everything and started no thread, so that
it costs its steps only. In turn a life is killed at a random time after its start, after the first
state it saved, and while it writes a file. Prints, as JSON, how many left a file half written.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402

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


def live(config, workdir: Path) -> int:
    """Starts a process that trains; returns its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # the progress bar
        status = 0 if run_lib.train(config, workdir) else 3
    finally:
        os._exit(status)


def half_written(workdir: Path) -> bool:
    return any(workdir.glob("checkpoints*/.*.partial"))


def saved(workdir: Path) -> int:
    """Changes whenever the state to resume from does."""
    path = workdir / "checkpoints-meta/checkpoint.pth"
    return path.stat().st_mtime_ns if path.exists() else 0


def main(workdir: Path, lives: int, overrides: dict) -> None:
    config = small_config(**overrides)
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    run_lib.Experiment.build(config)  # imports the rest
    datasets.get_dataset(config, "train")
    chance = random.Random(0)
    writing = 0
    for life in range(lives):
        for leftover in workdir.glob("checkpoints*/.*.partial"):
            leftover.unlink()  # the next one seen is of this life
        before = saved(workdir) if workdir.exists() else 0
        process = live(config, workdir)

        def wait_for(event, process=process):
            while not event() and not os.waitpid(process, os.WNOHANG)[0]:
                time.sleep(1e-4)

        if life % 3 == 0:
            time.sleep(chance.uniform(0, 0.4))
        else:
            wait_for(lambda before=before: saved(workdir) != before)
            time.sleep(chance.uniform(0, 0.2))
            if life % 3 == 2:
                wait_for(lambda: half_written(workdir))
                time.sleep(chance.uniform(0, 0.004))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise RuntimeError(f"life {life} ended by itself, with status {status}")
        writing += half_written(workdir)
    print(json.dumps({"half written": writing}))


if __name__ == "__main__":
    pairs = (argument.removeprefix("--config.").split("=", 1) for argument in sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), {key: json.loads(value) for key, value in pairs})
