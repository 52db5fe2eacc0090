"""The CUDA kernels: built on the first call that can use them, for the GPUs of this machine.

Ninja compiles them, which takes about half a minute, into a folder of the cache of torch's
extensions (`TORCH_EXTENSIONS_DIR`, by default under `~/.cache`) that is named by everything they
are made of. Where that fails, a warning says why and plain PyTorch computes the same. The
environment variable `PFGM_FUSED_OPS=0` switches the kernels off.
"""

import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("binding.cpp", "upfirdn2d.cu", "fused_leaky_relu.cu")
FLAGS = ["-O3"]
NAME = "pfgm_op"


def enabled(x: torch.Tensor) -> bool:
    """True if the operators should use kernels for `x`, which may be fake, where they exist."""
    on_cuda = x.is_cuda and torch.version.cuda is not None
    return on_cuda and os.environ.get("PFGM_FUSED_OPS") != "0"


def kernels(x: torch.Tensor) -> ModuleType | None:
    """The compiled kernels for `x`; None where they are not to be used or do not work."""
    return _trusted(x.device) if enabled(x) else None


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Memory format of an operator's result for `x`: `channels_last` if `x` is, else contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


@functools.cache
def _trusted(device: torch.device) -> ModuleType | None:
    """The kernels, after a first launch on `device`; None, after a warning, where they fail."""
    try:
        module = _module()
        _probe(module, device)
        return module
    except Exception as error:  # whatever a toolchain lacks, plain PyTorch still works
        lines = str(error).splitlines() or [repr(error)]
        reason = next((line for line in lines if re.search("error:|fatal", line)), lines[0])
        log.warning(f"op: plain PyTorch instead of the CUDA kernels: {reason}")
        return None


def _probe(module: ModuleType, device: torch.device) -> None:
    """Raise an error where a kernel does not run (built for another GPU, say) or is wrong."""
    ones = torch.ones(1, 1, 2, 2, device=device)
    total = module.upfirdn2d(ones, ones[0, 0], (1, 1), (1, 1), (0, 0), (1, 1))
    halved = module.fused_leaky_relu(-ones, ones[0, 0, 0, :1] * 0, None, 0.5, 1.0)
    results = total.flatten().tolist() + halved.flatten().tolist()
    if results != [4.0] + [-0.5] * 4:
        raise RuntimeError(f"the kernels compute {results} on {device}")


@functools.cache
def _module() -> ModuleType:
    """The kernels' module from the cache, into which the first process builds it."""
    from torch.utils import cpp_extension  # slow to import, and needed here only

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / f"{NAME}-{_fingerprint()}"
    library = folder / f"{NAME}.so"
    if not library.exists():  # a cache that has it need not be one that can be written to
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # ends with its process, however that ends
            if not library.exists():
                _build(library)
    try:
        spec = importlib.util.spec_from_file_location(NAME, library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        library.unlink()  # damaged: the next start builds it anew
        raise
    return module


def _build(library: Path) -> None:
    """Compile `library`, which appears when it is whole; only by one process at a time."""
    from torch.utils import cpp_extension

    # A ninja that pip installed lies beside the interpreter, which need not be on the path.
    folders = (os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts"))
    os.environ["PATH"] = os.pathsep.join(folders)
    # A build that was killed leaves its folder; its compiler may still run, so each has a new one.
    for remains in library.parent.glob("build-*"):
        shutil.rmtree(remains, ignore_errors=True)
    place = tempfile.mkdtemp(prefix="build-", dir=library.parent)
    log.info(f"building the CUDA kernels of op/, once, in {library.parent}")
    try:
        cpp_extension.load(
            name=NAME,
            sources=[str(FOLDER / source) for source in SOURCES],
            extra_cflags=FLAGS,
            extra_cuda_cflags=FLAGS,
            build_directory=place,
            is_python_module=False,
        )
        os.replace(Path(place) / library.name, library)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _fingerprint() -> str:
    """Digest of all that the library depends on: sources, flags, PyTorch, Python, architectures."""
    gpus = range(torch.cuda.device_count())
    capabilities = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
    facts = [FLAGS, torch.__version__, torch.version.cuda, sys.implementation.cache_tag]
    facts += [os.environ.get("TORCH_CUDA_ARCH_LIST") or capabilities]
    digest = hashlib.sha256(repr(facts).encode())
    for path in sorted(FOLDER.glob("*.[ch]*")):  # .cpp, .cu, .cuh, .h
        digest.update(repr((path.name, path.read_bytes())).encode())
    return digest.hexdigest()[:16]
