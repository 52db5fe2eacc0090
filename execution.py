"""How a network is run: precision, compiler, memory format. What it computes stays the same."""

import functools
import logging

import torch
from torch import Tensor, nn

import distributed

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "tf32", "bf16")


def for_training(config, model: nn.Module) -> nn.Module:
    """`model` as the training step calls it, as `config.training` asks; the weights are shared.

    Raises:
        ValueError: an unknown precision, or one that the device of `model` does not have.
    """
    training, device = config.training, next(model.parameters()).device
    check_precision(training.precision, device)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    network = BFloat16(model) if training.precision == "bf16" else model
    some_unused = not config.model.conditional  # published: layers without a use
    network = distributed.averaging_gradients(network, some_unused)
    # around the averaging, so that the compiler leaves room for it between stages of backward
    return compiled(network, device) if training.compile else network


def set_float32_products(precision: str) -> None:
    """For the whole process: TF32, 10 bits of each factor, if `precision` is that; else IEEE's.

    PyTorch by itself uses TF32 in convolutions and not in matrix products.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def check_precision(precision: str, device: torch.device) -> None:
    """Raises a ValueError unless `precision` is known and `device` has it in hardware."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"unknown training.precision={precision!r}; known: {', '.join(PRECISIONS)}"
        )
    if precision == "bf16" and not _has_bfloat16(device):
        raise ValueError(f"training.precision='bf16': {device} has no bfloat16; use 'fp32'")
    if precision == "tf32" and not _has_tf32(device):
        raise ValueError(f"training.precision='tf32': {device} has no TF32; use 'fp32'")


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _has_bfloat16(device: torch.device) -> bool:
    on_cpu = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return on_cpu or _has_tf32(device)  # GPUs got both with one generation


class BFloat16(nn.Module):
    """A network whose convolutions and matrix products are in bfloat16, its weights float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, x: Tensor, noise_label: Tensor, **conditions: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = self.model(x, noise_label, **conditions)
        return out.float() if isinstance(out, Tensor) else tuple(o.float() for o in out)


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` through torch.compile; as it is, after one warning, where that does not work."""
    # Static shapes: batch sizes hardly change, and with dynamic ones Inductor of PyTorch 2.13 fails
    # ("cannot determine truth value of Relational").
    return torch.compile(network, dynamic=False) if _compiler_works(device) else network


@functools.cache
def _compiler_works(device: torch.device) -> bool:
    """Whether a small function compiles: it takes a C++ compiler on a CPU, Triton on a GPU."""
    try:
        torch.compile(lambda x: (x.sin() + 1).cos())(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever is wrong with the toolchain, eager PyTorch still works
        reason = " ".join(str(error).split())
        log.warning(f"not compiled, which only costs speed: {type(error).__name__}: {reason:.200}")
        return False
