"""Measure the memory of loading a checkpoint of CIFAR-10's DDPM++, 990 MB with random weights.

    python3 benchmarks/load_memory.py [--config configs/poisson/cifar10_ddpmpp.py]
                                      [--checkpoint FILE]

A fresh process imports the program and loads the checkpoint by `experiment.load`. Its peak (VmHWM
of Linux, which counts the pages of mapped files too) beyond that after the imports is compared with
the size of the EMA weights: 1 is the least that a network needs. The checkpoint is made by another
process in a temporary folder and removed, unless a FILE is named, which is kept and used again.
"""

import multiprocessing
import re
import runpy
import tempfile
import time
from pathlib import Path

import common


def peak() -> int:
    """Most bytes that this process has held at once."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def make(path: Path, config_file: str) -> None:
    """Write a checkpoint of step 0 to `path`, as training does."""
    from experiment import Experiment
    from storage import run_config
    from storage.checkpoints import save_checkpoint
    from training import TrainState

    config = runpy.run_path(config_file)["get_config"]()
    config.device = "cpu"
    run = Experiment.build(config)
    state = TrainState.from_config(config, run.network, run.objective)
    content = state.state_dict() | {"written": [0], "config": run_config.flatten(config)}
    save_checkpoint(path, content)


def measure(path: Path) -> tuple[int, int, float]:
    """The process's peak after the imports and after loading `path`, and seconds of the latter."""
    from experiment import load

    imported, start = peak(), time.perf_counter()
    trained = load(path)
    seconds = time.perf_counter() - start
    assert trained.step == 0
    return imported, peak(), seconds


def weights_in(path: Path) -> int:
    """Bytes of the EMA weights in the checkpoint at `path`."""
    import torch

    state = torch.load(path, weights_only=True, mmap=True)
    return sum(tensor.nbytes for tensor in state["ema"]["shadow_params"])


def main() -> None:
    default = str(Path(__file__).parent.parent / "configs/poisson/cifar10_ddpmpp.py")
    options = common.options(__doc__, config=default, checkpoint=None)
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.checkpoint or f"{folder}/checkpoint_0.pth")
        # a process for each, so that the memory of one is not that of another
        if not path.exists():
            with fresh.Pool(1) as pool:
                pool.apply(make, (path, options.config))
        with fresh.Pool(1) as pool:
            weights = pool.apply(weights_in, (path,))
        with fresh.Pool(1) as pool:
            imported, loaded, seconds = pool.apply(measure, (path,))
        size = path.stat().st_size
    beyond = loaded - imported
    print(
        f"{size / 1e6:.0f} MB of checkpoint, {weights / 1e6:.0f} MB of EMA weights\n"
        f"peak after the imports {imported / 1e6:.0f} MB; loading adds {beyond / 1e6:.0f} MB, "
        f"{beyond / weights:.2f} times the EMA weights, in {seconds:.1f} s\n{common.setting()}"
    )


if __name__ == "__main__":
    main()
