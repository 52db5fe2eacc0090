"""What the benchmarks share: the path to the framework, options, timing and tables."""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


def options(doc: str, **defaults) -> argparse.Namespace:
    """Those of the command line, --{name} for each default, None standing for an unset string."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser.parse_args()


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """How long `action` takes on the device."""
    device = torch.device(device)
    synchronise(device)
    start = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - start


def medians(
    *actions: Callable[[], object], rounds: int, device: torch.device | str = "cpu"
) -> list[float]:
    """Median seconds of each of the actions, which run in turn `rounds` times."""
    times = [[seconds(action, device) for action in actions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def setting(device: torch.device | str = "cpu") -> str:
    """What the figures depend on besides the options: processor, threads, PyTorch."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
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
        cells = zip(values, self.formats, strict=True)
        print(
            *(
                f"{value:{re.match('[<>][0-9]+', kind)[0] if isinstance(value, str) else kind}}"
                for value, kind in cells
            )
        )
