"""The CUDA kernels: built on the first call that can use them, for the GPUs of this machine.

Ninja compiles them once into the cache folder of torch's extensions (`TORCH_EXTENSIONS_DIR`, by
default under `~/.cache`), which takes about half a minute. Without a GPU, nvcc, a C++ compiler or
ninja, one warning says what is missing and plain PyTorch computes the same. The environment
variable `PFGM_FUSED_OPS=0` switches the kernels off.
"""

import functools
import logging
import os
import re
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch

SOURCES = ("binding.cpp", "upfirdn2d.cu", "fused_leaky_relu.cu")


def kernels(x: torch.Tensor) -> ModuleType | None:
    """The compiled kernels if they are to be used for `x`, else None."""
    if os.environ.get("PFGM_FUSED_OPS") == "0" or not _gpu_available() or not x.is_cuda:
        return None
    return _build()


@functools.cache
def _gpu_available() -> bool:
    if torch.version.cuda and torch.cuda.is_available():
        return True
    _warn("there is no CUDA device")
    return False


@functools.cache
def _build() -> ModuleType | None:
    # A ninja that pip installed lies beside the interpreter, which need not be on the path.
    folders = (os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts"))
    os.environ["PATH"] = os.pathsep.join(folders)
    logging.info("building the CUDA kernels of op/, once")
    try:
        from torch.utils import cpp_extension  # slow to import, and needed here only

        return cpp_extension.load(
            name="pfgm_op",
            sources=[str(Path(__file__).parent / source) for source in SOURCES],
            extra_cflags=["-O3"],
            extra_cuda_cflags=["-O3"],
        )
    except Exception as error:  # whatever is wrong with the toolchain, plain PyTorch still works
        lines = str(error).splitlines() or [repr(error)]
        _warn(next((line for line in lines if re.search("error:|fatal", line)), lines[0]))
        return None


def _warn(reason: str) -> None:
    message = f"op: plain PyTorch instead of the CUDA kernels: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=5)  # at the caller of the operator
