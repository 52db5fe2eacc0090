"""Time, memory and error of the empirical Poisson field, against its broadcast form.

    python3 benchmarks/field.py

The broadcast form makes a tensor of size B * n * D, so it runs at small n only. Each measurement
is a process of its own, so that its peak memory is its own.
"""

import math
import subprocess
import sys

import common
import torch

from methods import field
from methods.field import poisson_field

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


def measure(form: str, n: int) -> None:
    """Prints seconds, extra bytes and the largest relative error over 16 points."""
    function = broadcast_field if form == "broadcast" else poisson_field
    field.has_fast_double = lambda device: form == "matrix"
    points, charges = problem(n)
    function(points[:2], charges[:8], GAMMA)  # libraries load and threads start

    def run() -> torch.Tensor:
        return function(points, charges, GAMMA)

    result, extra = common.with_peak_memory(run)
    times = [common.seconds(run) for _ in range(2 if form == "broadcast" else 5)]
    truth = torch.cat(
        [broadcast_field(p[None].double(), charges.double(), GAMMA) for p in points[:16]]
    )
    error = ((result[:16] - truth).norm(dim=1) / truth.norm(dim=1)).max().item()
    print(min(times), extra / 2**20, error)


def main() -> None:
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
        return
    print(f"B = {B}, D = {D}, {common.setting()}")
    columns = ("seconds", ">8.4f"), ("extra MiB", ">9.0f"), ("error", ">7.1e")
    table = common.Table(("n", ">6"), ("form", "<9"), *columns)
    for n, forms in SIZES.items():
        for form in forms:
            command = [sys.executable, __file__, form, str(n)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            table.row(n, form, *map(float, output.split()))


if __name__ == "__main__":
    main()
