"""Measure the time of the CIFAR-10 networks against their plain form.

    python3 benchmarks/networks.py [--nf 64] [--blocks 4] [--batch 16] [--rounds 7] [--device cpu]
        [--compile 1]

With --compile, which takes minutes, the network through torch.compile as well, in one graph. The
plain form is the same network, weight for weight, with attention and 1x1 maps as einsums and
resampling by zeros that reshapes insert, as in published programs. All run in turn in one process.
"""

from contextlib import AbstractContextManager
from functools import partial

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.poisson import cifar10_ddpmpp, cifar10_ncsnpp
from models import create_model, layers
from op.upfirdn import Pass

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


def plain_filtered(x: Tensor, whole: Pass) -> Tensor:
    """A pass whose factors and padding are the same for height and width."""
    return plain_upfirdn2d(x, whole.kernel, whole.up[0], whole.down[0], whole.pad[:2])


def plain_double(self: layers.Double, x: Tensor) -> Tensor:
    if self.kernel is None:
        b, c, h, w = x.shape
        return x.reshape(b, c, h, 1, w, 1).repeat(1, 1, 1, 2, 1, 2).reshape(b, c, 2 * h, 2 * w)
    p = len(self.kernel) - 2
    return plain_upfirdn2d(x, self.kernel, up=2, pad=((p + 1) // 2 + 1, p // 2))


def plain_convolved(self: layers.Double, x: Tensor, layer: nn.Conv2d) -> Tensor:
    return layer(self(x))


def plain_halve(self: layers.Halve, x: Tensor) -> Tensor:
    if self.kernel is None:
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5))
    p = len(self.kernel) - 2
    return plain_upfirdn2d(x, self.kernel, down=2, pad=((p + 1) // 2, p // 2))


def plain() -> AbstractContextManager:
    """Within the `with` block every network computes in its plain form."""
    return common.patched(
        (layers.NIN, "forward", plain_nin),
        (layers.Attention, "forward", plain_attention),
        (layers.Double, "forward", plain_double),
        (layers.Double, "convolved", plain_convolved),
        (layers.Halve, "forward", plain_halve),
        (layers, "filtered", plain_filtered),
    )


def main() -> None:
    defaults = {"nf": 64, "blocks": 4, "batch": 16, "rounds": 7, "device": common.CPU, "compile": 0}
    options = common.options(__doc__, **defaults)
    print(
        f"nf = {options.nf}, {options.blocks} blocks a level, batch {options.batch}, 32 x 32, "
        f"{common.setting(options.device)}; medians of {options.rounds}"
    )
    columns = ("seconds", ">9.3f"), ("plain", ">9.3f"), ("plain / it", ">11.2f")
    table = common.Table(
        ("network", "<8"), ("pass", "<17"), ("form", "<9"), *columns, ("differ", ">7.0e")
    )
    for name, experiment in NETWORKS.items():
        config = experiment.get_config()
        config.model.update(nf=options.nf, num_res_blocks=options.blocks)
        torch.manual_seed(0)
        model = create_model(config).to(options.device).eval()
        with torch.no_grad():  # last layers that start near zero would hide a difference
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        x = torch.rand(options.batch, 3, 32, 32, device=options.device) * 2 - 1
        z = torch.rand(options.batch, device=options.device) * 10 + 0.1
        forms = {"eager": model}
        if options.compile:
            forms["compiled"] = torch.compile(model, fullgraph=True, dynamic=False)

        @torch.no_grad()
        def forward(network, x=x, z=z):
            return network(x, z)[0]

        def both(network, model=model, x=x, z=z):
            model.zero_grad()
            field_x, field_z = network(x, z)
            (field_x.square().mean() + field_z.square().mean()).backward()
            return model.stem.weight.grad

        for passes, run in (("forward", forward), ("forward+backward", both)):
            truth = plain()(run)(model).clone()
            differ = [((run(form) - truth).norm() / truth.norm()).item() for form in forms.values()]
            actions = [partial(plain()(run), model), *(partial(run, f) for f in forms.values())]
            plain_t, *times = common.medians(*actions, rounds=options.rounds, device=options.device)
            for form, t, d in zip(forms, times, differ, strict=True):
                table.row(name, passes, form, t, plain_t, plain_t / t, d)


if __name__ == "__main__":
    main()
