"""Measure the memory of training in several processes, with the state in each or divided.

    python3 benchmarks/shares.py [--config configs/poisson/cifar10_ddpmpp.py] [--processes 2,4]

Each process takes two steps on one random image, on the CPU, over gloo. For the process with the
largest value, the table has the memory that it holds between two steps, by kind, and all that is
resident beyond the imports (VmRSS), in MB; and the seconds of the second step and of a checkpoint's
`state_dict`, which brings a divided state together in the main process.
"""

import ctypes
import multiprocessing
import os
import re
import runpy
import socket
import time
from pathlib import Path

import common

KINDS = ("weights", "gradients", "moments", "EMA weights", "resident")


def resident() -> int:
    """Resident memory of this process in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(rank: int, environment: dict, config_file: str, divided: bool, results) -> None:
    """Train, and put bytes by kind and seconds into the queue `results`."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    import torch

    import distributed
    import execution
    from experiment import Experiment
    from sources.batch import Batch
    from training import TrainState, train_step

    torch.set_num_threads(1)
    config = runpy.run_path(config_file)["get_config"]()
    config.device, config.training.share_state = "cpu", divided
    world = distributed.world()
    config.training.update(batch_size=world, small_batch_size=0)
    before = resident()
    with distributed.joined():
        run = Experiment.build(config)
        state = TrainState.from_config(config, run.network, run.objective)
        state.network = execution.for_training(
            run.network, some_unused=not config.model.conditional
        )
        batch = Batch(torch.rand(world, *run.codec.shape, generator=torch.manual_seed(0)))
        for _ in range(2):
            start = time.perf_counter()
            train_step(state, batch, torch.manual_seed(0), (rank, world))
            step_s = time.perf_counter() - start
        moments = [t for entry in state.optimizer.state.values() for t in entry.values()]
        groups = (
            state.parameters,
            [p.grad for p in state.parameters if p.grad is not None],
            moments,
            [average for average in state.ema.shadow_params if not average.is_meta],
        )
        sizes = [sum(tensor.nbytes for tensor in group) for group in groups]
        sizes.append(resident() - before)
        distributed.barrier()
        start = time.perf_counter()
        state.state_dict()
        results.put((sizes, step_s, time.perf_counter() - start))


def largest(processes: int, config_file: str, divided: bool) -> list[float]:
    """The largest value of each kind and of the seconds, over the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: str(value) for name, value in environment.items()}
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (environment, config_file, divided, results)
    workers = [context.Process(target=measure, args=(r, *arguments)) for r in range(processes)]
    for worker in workers:
        worker.start()
    rows = [[*sizes, step_s, save_s] for sizes, step_s, save_s in (results.get() for _ in workers)]
    for worker in workers:
        worker.join()
    return [*map(max, zip(*rows, strict=True))]


def main() -> None:
    options = common.options(__doc__, config="configs/poisson/cifar10_ddpmpp.py", processes="2,4")
    print(f"{options.config}, {common.setting()}; MB of the process with the most")
    columns = [(kind, ">12.0f") for kind in KINDS] + [("step s", ">8.2f"), ("state s", ">8.2f")]
    table = common.Table(("processes", "<12"), ("state", "<10"), *columns)
    for processes in map(int, options.processes.split(",")):
        for divided in (False, True):
            *sizes, step_s, save_s = largest(processes, options.config, divided)
            form = "divided" if divided else "whole"
            table.row(str(processes), form, *(size / 1e6 for size in sizes), step_s, save_s)


if __name__ == "__main__":
    main()
