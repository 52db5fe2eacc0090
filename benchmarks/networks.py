"""Time of the CIFAR-10 networks against their plain form, in one process, turn by turn.

    python3 benchmarks/networks.py [--nf 64] [--batch 16] [--rounds 7] [--device cpu]

The plain form is the same network, weight for weight, with attention as explicit einsums, 1x1 maps
as einsums, and resampling by inserting zeros with reshapes, as its ancestors have them.
"""

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from configs.poisson import cifar10_ddpmpp, cifar10_ncsnpp  # noqa: E402
from models import create_model, layers  # noqa: E402

NETWORKS = {"DDPM++": cifar10_ddpmpp, "NCSN++": cifar10_ncsnpp}


def plain_nin(self: layers.NIN, x: Tensor) -> Tensor:
    return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[:, None, None]


def plain_attention(self: layers.Attention, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    h = self.norm(x)
    q, k, v = self.query(h), self.key(h), self.value(h)
    weights = torch.einsum("bchw,bcij->bhwij", q, k) * x.shape[1] ** -0.5
    weights = weights.flatten(3).softmax(-1).view(-1, height, width, height, width)
    h = self.out(torch.einsum("bhwij,bcij->bchw", weights, v))
    return layers.residual_sum(x, h, self.skip_rescale)


def plain_upfirdn2d(
    x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> Tensor:
    b, c, h, w = x.shape
    x = F.pad(x.reshape(b * c, 1, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1))
    x = F.pad(x.reshape(b * c, 1, h * up, w * up), (*pad, *pad))
    x = F.conv2d(x, kernel.flip(0, 1)[None, None])
    x = x.reshape(b, c, *x.shape[2:])
    return x[:, :, ::down, ::down]


def plain_double(self: layers.Double, x: Tensor) -> Tensor:
    if self.kernel is None:
        b, c, h, w = x.shape
        return x.reshape(b, c, h, 1, w, 1).repeat(1, 1, 1, 2, 1, 2).reshape(b, c, 2 * h, 2 * w)
    p = len(self.kernel) - 2
    return plain_upfirdn2d(x, self.kernel, up=2, pad=((p + 1) // 2 + 1, p // 2))


def plain_halve(self: layers.Halve, x: Tensor) -> Tensor:
    if self.kernel is None:
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5))
    p = len(self.kernel) - 2
    return plain_upfirdn2d(x, self.kernel, down=2, pad=((p + 1) // 2, p // 2))


def plain() -> ExitStack:
    """Within the `with` block every network computes in its plain form."""
    stack = ExitStack()
    for target, name, function in (
        (layers.NIN, "forward", plain_nin),
        (layers.Attention, "forward", plain_attention),
        (layers.Double, "forward", plain_double),
        (layers.Halve, "forward", plain_halve),
        (layers, "upfirdn2d", plain_upfirdn2d),
    ):
        stack.enter_context(mock.patch.object(target, name, function))
    return stack


def seconds(run, device: torch.device) -> float:
    def synchronise():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nf", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()
    print(
        f"nf = {options.nf}, batch {options.batch}, 32 x 32, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.rounds}"
    )
    print(f"{'network':<8}{'pass':<18}{'seconds':>9}{'plain':>9}{'plain / ours':>14}{'differ':>9}")
    for name, config in NETWORKS.items():
        config = config.get_config()
        config.model.nf = options.nf
        torch.manual_seed(0)
        model = create_model(config).to(options.device).eval()
        with torch.no_grad():  # last layers that start near zero would hide a difference
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        x = torch.rand(options.batch, 3, 32, 32, device=options.device) * 2 - 1
        z = torch.rand(options.batch, device=options.device) * 10 + 0.1

        @torch.no_grad()
        def forward(model=model, x=x, z=z):
            return model(x, z)[0]

        def both(model=model, x=x, z=z):
            model.zero_grad()
            field_x, field_z = model(x, z)
            (field_x.square().mean() + field_z.square().mean()).backward()

        ours = forward()
        with plain():
            differ = ((ours - forward()).norm() / ours.norm()).item()
        for what, run in (("forward", forward), ("forward+backward", both)):
            times, plain_times = [], []
            run()
            for _ in range(options.rounds):
                times.append(seconds(run, options.device))
                with plain():
                    plain_times.append(seconds(run, options.device))
            t, p = statistics.median(times), statistics.median(plain_times)
            print(f"{name:<8}{what:<18}{t:>9.3f}{p:>9.3f}{p / t:>14.2f}{differ:>9.0e}")


if __name__ == "__main__":
    main()
