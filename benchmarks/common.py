"""What the benchmarks share: the path to the framework, options, timing, memory and tables."""

import argparse
import contextlib
import ctypes
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

import methods
from storage import run_config
from storage.checkpoints import load_checkpoint

CPU = torch.device("cpu")


def options(doc: str, paths: str | None = None, /, **defaults) -> argparse.Namespace:
    """Those of the command line, --{name} for each default, None standing for an unset string.

    With `paths`, one path or more come before them, and are called so.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    if paths:
        parser.add_argument(paths, nargs="+", type=Path)
    for name, default in defaults.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser.parse_args()


class Stopwatch:
    """Seconds by phase; the device is waited for at either end of one."""

    def __init__(self, device: torch.device = CPU):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time in the `with` block, or in every call of a function it decorates."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seconds(action: Callable[[], object], device: torch.device = CPU) -> float:
    """How long `action` takes on the device."""
    watch = Stopwatch(device)
    watch.phase("action")(action)()
    return watch.seconds["action"]


def medians(*actions: Callable[[], object], rounds: int, device: torch.device = CPU) -> list[float]:
    """Median seconds of each of the actions, which run in turn `rounds` times."""
    times = [[seconds(action, device) for action in actions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def with_peak_memory(action: Callable[[], Any], device: torch.device = CPU) -> tuple[Any, int]:
    """What `action` returns, and the most bytes that it holds at once.

    On a GPU everything counts, the weights too; on the CPU (Linux) what is added to the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return action(), torch.cuda.max_memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what `action` takes
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


def setting(device: torch.device = CPU) -> str:
    """What the figures depend on besides the options: processor, threads, PyTorch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else "CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class Table:
    """Prints rows as they come, below their titles.

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
        print(*map(format, values, kinds))


def curves(workdirs: Sequence[Path]) -> dict[Path, str]:
    """The curve that each run belongs to; runs of one curve differ in their seeds and nothing else.

    It is called as `name_of` says, and by the settings that differ between runs of that name.

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
    found: dict[Path, str] = {}
    for workdir, name in names.items():
        beside = [settings[other] for other in names if names[other] == name]
        keys = [k for k in beside[0] if k != "seed" and any(s[k] != beside[0][k] for s in beside)]
        found[workdir] = ", ".join([name, *(f"{k} = {settings[workdir][k]}" for k in keys)])
        seed = settings[workdir]["seed"]
        for other in list(found)[:-1]:
            if (found[other], settings[other]["seed"]) == (found[workdir], seed):
                raise ValueError(f"{other} and {workdir} are one seed, {seed}, and count once")
    return found


def name_of(config, method) -> str:
    """The name of the `method`, and its target where that is not the image."""
    means = config.training.target == "posterior_mean"
    return method.name + (", posterior means" if means else "")
