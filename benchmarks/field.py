"""Time, memory and error of the empirical Poisson field, against its broadcast form.

    python3 benchmarks/field.py

The broadcast form makes a tensor of size B * n * D, so it runs at small n only. Each measurement
is a process of its own, so that its peak memory is its own.
"""

import math
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import methods  # noqa: E402
from methods import poisson_field  # noqa: E402

B, D, GAMMA = 128, 3072, 5.0
OURS = ("matrix", "split")  # float64 products, and float32 ones for devices slow at these
SIZES = {512: ("broadcast", *OURS), 4096: OURS, 50000: OURS}


def broadcast_field(points: torch.Tensor, charges: torch.Tensor, gamma: float) -> torch.Tensor:
    """The field as published: all B * n differences at once."""
    charges = torch.cat([charges.flatten(1), charges.new_zeros(len(charges), 1)], dim=1)
    arms = charges[None] - points[:, None]
    distance = arms.norm(dim=2)
    nearest = distance.min(dim=1, keepdim=True).values
    weights = (nearest / distance) ** points.shape[1]
    weights = weights / weights.sum(dim=1, keepdim=True)
    field = (weights[..., None] * arms).sum(dim=1)
    norm = field.norm(dim=1, keepdim=True)
    return math.sqrt(points.shape[1] - 1) * field / (norm + gamma)


def problem(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the first B of n images, at distances from sigma to far away."""
    generator = torch.Generator().manual_seed(0)
    charges = torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1
    scale = 0.01 * 1.03 ** (torch.rand(B, 1, generator=generator) * 291)
    noise = torch.randn(B, D + 1, generator=generator) * scale
    noise[:, -1].abs_()
    noise[:, :-1] += charges[:B].flatten(1)
    return noise, charges


def memory(which: str) -> int:
    """Bytes of resident memory (Linux): "VmRSS" now, "VmHWM" at its highest since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {which} in /proc/self/status")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(form: str, n: int) -> None:
    """Prints seconds, extra bytes and the largest relative error over 16 points."""
    function = broadcast_field if form == "broadcast" else poisson_field
    methods.has_fast_double = lambda device: form == "matrix"
    points, charges = problem(n)
    function(points[:2], charges[:8], GAMMA)  # libraries load and threads start
    before = memory("VmRSS")
    reset_peak()
    field = function(points, charges, GAMMA)
    extra = memory("VmHWM") - before
    times = []
    for _ in range(2 if form == "broadcast" else 5):
        start = time.perf_counter()
        function(points, charges, GAMMA)
        times.append(time.perf_counter() - start)
    truth = torch.cat(
        [broadcast_field(p[None].double(), charges.double(), GAMMA) for p in points[:16]]
    )
    error = ((field[:16] - truth).norm(dim=1) / truth.norm(dim=1)).max().item()
    print(min(times), extra, error)


def main() -> None:
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
        return
    print(f"B = {B}, D = {D}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'n':>6}  {'form':<9}  {'seconds':>8}  {'extra MiB':>9}  {'error':>7}")
    for n, forms in SIZES.items():
        seconds = {}
        for form in forms:
            command = [sys.executable, __file__, form, str(n)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds[form], extra, error = map(float, output.split())
            print(f"{n:>6}  {form:<9}  {seconds[form]:>8.4f}  {extra / 2**20:>9.0f}  {error:>7.1e}")
        if "broadcast" in seconds:
            print(f"        matrix is {seconds['broadcast'] / seconds['matrix']:.0f} times faster")


if __name__ == "__main__":
    main()
