"""Parts of all benchmarks: the path to the framework, options, timing, memory and tables."""

import argparse
import contextlib
import ctypes
import gc
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import execution
import methods
from storage import run_config
from storage.checkpoints import load_checkpoint

CPU = torch.device("cpu")


def options(doc: str, paths: str | None = None, /, **defaults) -> argparse.Namespace:
    """The command line's options, --{name} for each of the `defaults`; None is an unset string.

    Args:
        doc: text of --help.
        paths: name of one path or more that stand before the options.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    if paths:
        parser.add_argument(paths, nargs="+", type=Path)
    for name, default in defaults.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser.parse_args()


def card() -> torch.device:
    """The GPU; without one, the program ends with one line."""
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device, so there is nothing to measure")
    return torch.device("cuda")


def can_compile(device: str) -> bool:
    """Whether torch.compile works on the device of that name, by the check that training makes."""
    network = torch.nn.Identity()
    return execution.compiled(network, execution.named_device(device)) is not network


def free_memory() -> None:
    """Free the GPU memory of a measurement, so that none of it counts for the next one."""
    if torch.cuda.is_available():
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


class Stopwatch:
    """Seconds of each phase, by name; it waits for the device where a phase begins and ends."""

    def __init__(self, device: torch.device = CPU):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block, or of every call of a function it decorates."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seconds(action: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds that `action` takes on the device."""
    watch = Stopwatch(device)
    watch.phase("action")(action)()
    return watch.seconds["action"]


def medians(*actions: Callable[[], object], rounds: int, device: torch.device = CPU) -> list[float]:
    """Median seconds of each of the `actions`, which run in turn `rounds` times."""
    times = [[seconds(action, device) for action in actions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def with_peak_memory(action: Callable[[], Any], device: torch.device = CPU) -> tuple[Any, int]:
    """The result of `action`, and the most bytes that it holds at once.

    On a GPU everything counts, the weights too; on the CPU (Linux) only memory that the process
    takes beyond that from before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return action(), torch.cuda.max_memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # `action` would take freed memory without a trace
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here

    def resident(which: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) * 1024

    before = resident("VmRSS")
    return action(), resident("VmHWM") - before


@contextlib.contextmanager
def patched(*replacements: tuple[object, str, Callable]) -> Iterator[None]:
    """Within the `with` block, attributes (of an object, by name) are replaced by functions."""
    with contextlib.ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(mock.patch.object(*replacement))
        yield


def device_name(device: torch.device = CPU) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else "CPU"


def setting(device: torch.device = CPU) -> str:
    """Processor, threads and PyTorch, on which figures depend besides the options."""
    threads = torch.get_num_threads()
    return f"{device_name(device)}, {threads} threads, torch {torch.__version__}"


class Table:
    """A table that prints its titles at once and each row as it comes.

    `columns` are pairs of a title and the format of its values, which starts with alignment and
    width, as in ">8.3f"; a string as value is only aligned.
    """

    def __init__(self, *columns: tuple[str, str]):
        self.formats = [kind for _, kind in columns]
        self.row(*(title for title, _ in columns))

    def row(self, *values) -> None:
        kinds = [
            re.match("[<>][0-9]+", kind)[0] if isinstance(value, str) else kind
            for value, kind in zip(values, self.formats, strict=True)
        ]
        print(*map(format, values, kinds), flush=True)


def curves(workdirs: Sequence[Path]) -> dict[Path, str]:
    """Name of the curve of each run; runs of one curve differ in their seeds and nothing else.

    It is that of `name_of`, with the settings that differ between runs of that name.

    Raises:
        ValueError: there is no run in a workdir, or two of a curve have one seed.
    """
    names, settings = {}, {}
    for workdir in workdirs:
        if (stored := run_config.find(workdir)) is None:
            raise ValueError(f"there is no run in {workdir}")
        path, config = stored
        step = load_checkpoint(path)["step"] if path.suffix == ".pth" else 0
        names[workdir] = name_of(config, methods.get_method(config))
        settings[workdir] = run_config.flatten(config) | {"step": step}
    curve_of: dict[Path, str] = {}
    for workdir, name in names.items():
        beside = [settings[other] for other in names if names[other] == name]
        keys = [k for k in beside[0] if k != "seed" and any(s[k] != beside[0][k] for s in beside)]
        curve_of[workdir] = ", ".join([name, *(f"{k} = {settings[workdir][k]}" for k in keys)])
        seed = settings[workdir]["seed"]
        for other in list(curve_of)[:-1]:
            if (curve_of[other], settings[other]["seed"]) == (curve_of[workdir], seed):
                raise ValueError(f"{other} and {workdir} are one seed, {seed}, and count once")
    return curve_of


def name_of(config, method) -> str:
    """Name of the `method`, and of its target where that is not the image."""
    means = config.training.target == "posterior_mean"
    return method.name + (", posterior means" if means else "")
