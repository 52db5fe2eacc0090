"""Precision, compiler and memory of a network, which change how it runs and not its results."""

import contextlib
import ctypes
import functools
import logging
import platform
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import distributed

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions of 16 bits
GAIN = 1.1  # least speed of 16 bits relative to float32 that is worth their rounding
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


# Parts of PyTorch with a precision of float32 products; where a caller has set these, reading their
# older names raises.
PRODUCTS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.rnn,
)


def for_training(
    model: nn.Module,
    precision: str = "fp32",
    channels_last: bool = False,
    compiles: bool = False,
    some_unused: bool = False,
) -> nn.Module:
    """The network that the training step calls, of the weights of `model`.

    With `some_unused` its output does not depend on all of its parameters.

    Raises:
        ValueError: the precision is unknown, or the device of `model` does not support it.
    """
    device = next(model.parameters()).device
    check_precision(precision, device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    network = in_precision(model, precision)
    network = distributed.averaging_gradients(network, some_unused)
    # around the averaging, so that the compiler leaves room for it between stages of backward
    return compiled(network, device) if compiles else network


def for_sampling(
    net: Callable[..., Tensor],
    device: torch.device,
    precision: str = "fp32",
    channels_last: bool = False,
    compiles: bool = False,
) -> Callable[..., Tensor]:
    """The network that a sampler calls, whose outputs are float32 whatever the `precision`.

    `net` itself stays as it is, since training may go on with it: with `channels_last` only the
    images are laid out so, which convolutions pass on.
    """
    net = compiled(net, device) if compiles else net
    net = in_precision(net, precision)
    if not channels_last:
        return net

    def run(x: Tensor, noise_label: Tensor, **conditions: Tensor) -> Tensor:
        # x.contiguous(memory_format=...) would leave the strides of grey images as they are
        x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        return net(x, noise_label, **conditions)

    return run


def measured_precision(
    net: nn.Module, run: Callable[[nn.Module], object], rounds: int = 3
) -> tuple[str, str]:
    """Precision that 'auto' means for `net`, "fp32", "bf16" or "fp16", and the reason in words.

    The device's 16-bit precision (float16 only on a GPU without bfloat16) is chosen where it makes
    `run(network)` at least `GAIN` times as fast, else float32. Both are run in turn; the fastest of
    `rounds` runs counts, after one that is not counted. All processes get the same precision.
    """
    device = next(net.parameters()).device
    if not _has_bfloat16(device) and device.type != "cuda":
        return "fp32", f"{device} has no bfloat16"
    half = "bf16" if _has_bfloat16(device) else "fp16"
    forms = {"fp32": net, half: HalfPrecision(net, HALVES[half])}
    seconds = {name: [] for name in forms}
    for _ in range(1 + rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            run(form)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    gain = min(seconds["fp32"][1:]) / min(seconds[half][1:])
    precision = half if distributed.any_of(gain >= GAIN) else "fp32"
    name = str(HALVES[half]).removeprefix("torch.")
    return precision, f"{name} is measured to be {gain:.2f} times as fast as float32"


def set_float32_products(precision: str) -> None:
    """Turn on TF32, 10 bits of each factor, in the whole process for 'tf32', else turn it off.

    PyTorch's defaults are TF32 in convolutions and not in matrix products.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within the `with` block matrix products and convolutions of float32 are without TF32.

    Nor does autocast that is on outside of it change them.
    """
    precisions = [each.fp32_precision for each in PRODUCTS]
    try:
        older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        set_float32_products("fp32")
    except RuntimeError:  # the caller has set the newer names
        older = None
        for each in PRODUCTS:
            each.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older[0])
            torch.backends.cudnn.allow_tf32 = older[1]
        else:
            for each, precision in zip(PRODUCTS, precisions, strict=True):
                each.fp32_precision = precision


@contextlib.contextmanager
def own_numerics() -> Iterator[None]:
    """Within the `with` block a caller's TF32, autocast and default dtype change nothing."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with full_float32():
            yield
    finally:
        torch.set_default_dtype(default)


def prepare_process(precision: str, device: torch.device) -> None:
    """Set options of the whole process, as programs do; a caller of the library sets its own.

    `precision` is that of `training.precision`; see `set_float32_products`, `keep_freed_memory`.
    """
    set_float32_products(precision)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Keep memory on the CPU that this process frees for its next tensors, from now on.

    By default glibc gives blocks of 32 MiB and more back to the system, which then has to zero new
    pages for every large tensor (mallopt(3)). Now free memory goes back only above 2 GiB at the top
    of the heap: a process may stay as large as it once was. Other C libraries are left as they are,
    and so is glibc before 2.35, which takes no threshold above 32 MiB.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, largest = ctypes.CDLL(None).mallopt, 2**31 - 1
        if mallopt(_M_MMAP_THRESHOLD, largest):
            mallopt(_M_TRIM_THRESHOLD, largest)


def check_precision(precision: str, device: torch.device, key: str = "training.precision") -> None:
    """Raise ValueError unless `precision`, the value of `key`, is one that `device` has.

    'auto' is none: training and evaluation replace it at their start.
    """
    if precision == "auto":
        raise ValueError(f"{key}='auto' is open: training and evaluation measure it at their start")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown {key}={precision!r}; known: {', '.join(PRECISIONS)}")
    if precision == "bf16" and not _has_bfloat16(device):
        instead = "'fp16' or 'fp32'" if device.type == "cuda" else "'fp32'"
        raise ValueError(f"{key}='bf16': {device} has no bfloat16; use {instead}")
    if precision == "tf32" and not _has_tf32(device):
        raise ValueError(f"{key}='tf32': {device} has no TF32; use 'fp32'")


def has_precision(precision: str, device: torch.device) -> bool:
    """Whether `check_precision` accepts `precision` on `device`."""
    try:
        check_precision(precision, device)
    except ValueError:
        return False
    return True


def named_device(name: str) -> torch.device:
    """The device that `device`, "auto" or a name of PyTorch, means in this process.

    Raises ValueError where it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(torch.device(name))
        return torch.empty(0, dtype=torch.float64, device=device).device
    except TypeError as error:  # as Apple's MPS raises
        raise ValueError(
            f"device={name!r} has no float64, in which targets, distances and likelihoods are "
            "computed: use device=cpu"
        ) from error
    except (RuntimeError, AssertionError) as error:
        number = torch.cuda.device_count()
        have = ", ".join(f"cuda:{i}" for i in range(number)) or "no GPU that PyTorch can use"
        raise ValueError(
            f"device={name!r} cannot be used: {str(error).splitlines()[0]}; there is {have}: "
            "device=auto takes a GPU where there is one, else the CPU"
        ) from error


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _has_bfloat16(device: torch.device) -> bool:
    on_cpu = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return on_cpu or _has_tf32(device)  # GPUs got both with one generation


class HalfPrecision(nn.Module):
    """A network with convolutions and matrix products in `dtype`, and weights in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(
        self, x: Tensor, noise_label: Tensor, **conditions: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(x.device.type, dtype=self.dtype):
            out = self.model(x, noise_label, **conditions)
        return out.float() if isinstance(out, Tensor) else tuple(o.float() for o in out)


def in_precision(net: nn.Module, precision: str) -> nn.Module:
    """`net` with products in 16 bits where `precision` is one of `HALVES`, else `net` itself."""
    return HalfPrecision(net, HALVES[precision]) if precision in HALVES else net


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` through torch.compile; as it is, after one warning, where that does not work."""
    # static shapes: batch sizes hardly change, and with dynamic ones Inductor of PyTorch 2.13 fails
    # ("cannot determine truth value of Relational")
    return torch.compile(network, dynamic=False) if _compiler_works(device) else network


@functools.cache
def _compiler_works(device: torch.device) -> bool:
    """True if a small function compiles, which takes a C++ compiler on a CPU, Triton on a GPU."""
    try:
        torch.compile(lambda x: (x.sin() + 1).cos())(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever is wrong with the toolchain, eager PyTorch still works
        reason = " ".join(str(error).split())
        log.warning(f"not compiled, which only costs speed: {type(error).__name__}: {reason:.200}")
        return False
