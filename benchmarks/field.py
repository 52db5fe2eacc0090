"""Measure time, memory and error of the targets of a reference batch, against the broadcast form.

    python3 benchmarks/field.py

The targets are the empirical Poisson field and the posterior mean of PFGM++ (D = 2048 and inf). The
broadcast form makes a tensor of size B * n * N, so it runs at small n only. Each measurement is a
process of its own, and so is its peak memory.
"""

import math
import subprocess
import sys
from collections.abc import Callable

import common
import torch

from methods import field
from methods.field import poisson_field, posterior_mean

B, N, GAMMA = 128, 3072, 5.0
OURS = ("matrix", "split")  # float64 products, and float32 ones for devices slow at these
SIZES = {512: ("broadcast", *OURS), 4096: OURS, 50000: OURS}
TARGETS = {"field": 1.0, "mean": 2048.0, "EDM's mean": math.inf}  # by name, with their D


def broadcast_mean(x: torch.Tensor, y: torch.Tensor, sigma: torch.Tensor, D: float) -> torch.Tensor:
    """The posterior mean as published: all B * n differences at once."""
    y = y.flatten(1)
    squared = (y[None] - x[:, None]).square().sum(2)
    power = -squared / (2 * sigma**2)
    if math.isfinite(D):
        power = -(x.shape[1] + D) / 2 * (squared + D * sigma**2).log()
    weights = power.softmax(1)
    return (weights[..., None] * y[None]).sum(1)


def broadcast_field(points: torch.Tensor, charges: torch.Tensor, gamma: float) -> torch.Tensor:
    """The field of Poisson flow as published."""
    x, z = points[:, :-1], points[:, -1:]
    field = torch.cat([broadcast_mean(x, charges, z, 1.0) - x, -z], dim=1)
    return math.sqrt(x.shape[1]) * field / (field.norm(dim=1, keepdim=True) + gamma)


def functions(target: str, form: str) -> Callable[..., torch.Tensor]:
    """The function from points p = (x, sigma), (B, N + 1), and images to a target, in a form."""
    D = TARGETS[target]

    def mean(points, images):
        x, sigma = points[:, :-1], points[:, -1]
        if form == "broadcast":
            return broadcast_mean(x, images, sigma[:, None], D)
        return posterior_mean(x.view(-1, *images.shape[1:]), images, sigma, D).flatten(1)

    def normalised(points, images):
        return (broadcast_field if form == "broadcast" else poisson_field)(points, images, GAMMA)

    return normalised if target == "field" else mean


def problem(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the first B of n images, at distances from sigma to far away."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1
    scale = 0.01 * 1.03 ** (torch.rand(B, 1, generator=generator) * 291)
    noise = torch.randn(B, N + 1, generator=generator) * scale
    noise[:, -1].abs_()
    noise[:, :-1] += images[:B].flatten(1)
    return noise, images


def measure(target: str, form: str, n: int) -> None:
    """Print seconds, extra MiB and the largest relative error over 16 points."""
    function, broadcast = functions(target, form), functions(target, "broadcast")
    field.has_fast_double = lambda device: form == "matrix"
    points, images = problem(n)
    function(points[:2], images[:8])  # libraries load and threads start

    def run() -> torch.Tensor:
        return function(points, images)

    result, extra = common.with_peak_memory(run)
    times = [common.seconds(run) for _ in range(2 if form == "broadcast" else 5)]
    truth = torch.cat([broadcast(p[None].double(), images.double()) for p in points[:16]])
    error = ((result[:16] - truth).norm(dim=1) / truth.norm(dim=1)).max().item()
    print(min(times), extra / 2**20, error)


def main() -> None:
    if len(sys.argv) == 4:
        measure(*sys.argv[1:3], int(sys.argv[3]))
        return
    print(f"B = {B}, N = {N}, {common.setting()}")
    columns = ("seconds", ">8.4f"), ("extra MiB", ">9.0f"), ("error", ">7.1e")
    table = common.Table(("target", "<10"), ("n", ">6"), ("form", "<9"), *columns)
    for target in TARGETS:
        for n, forms in SIZES.items():
            for form in forms:
                command = [sys.executable, __file__, target, form, str(n)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                table.row(target, n, form, *map(float, output.split()))


if __name__ == "__main__":
    main()
