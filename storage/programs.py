"""Programs of PyTorch in files: `torch.export` and TorchScript. Loading one can run any code."""

import io
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from storage.files import one_line, open_regular


def read(path: str | Path) -> bytes:
    """The content of the file at `path`, from which its program is recognised and loaded."""
    with open_regular(Path(path)) as file:
        return file.read()


def is_exported(content: bytes) -> bool:
    """Whether `content` is an archive of `torch.export.save`, of any version."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    return bool(names & {"archive_format", "serialized_exported_program.json"})


def load_exported(content: bytes, name: str, device: torch.device) -> Callable:
    """The program of torch.export in `content`, as a function of a batch of images.

    Raises ValueError, with a message that begins with `name`, where it cannot be loaded.
    """
    from torch.export.passes import move_to_device_pass

    try:
        program = move_to_device_pass(torch.export.load(io.BytesIO(content)), device)
        module = program.module()
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(
            f"{name} is no program of torch.export that can be loaded: {one_line(error)}"
        ) from error

    def call(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if len(x) > 1:
            return module(x)
        outputs = module(x.repeat(2, 1, 1, 1))  # a program may need two or more images
        return outputs[:1] if isinstance(outputs, Tensor) else tuple(y[:1] for y in outputs)

    return call


def load_torchscript(
    content: bytes, name: str, device: torch.device, methods: Sequence[str] = ("forward",)
) -> torch.jit.ScriptModule:
    """The TorchScript module in `content`, which must have `methods`; raises as `load_exported`."""
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch calls TorchScript deprecated
            module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(
            f"{name} is not a TorchScript module, nor a program of torch.export: {one_line(error)}"
        ) from error
    if missing := [method for method in methods if not hasattr(module, method)]:
        raise ValueError(f"{name} is a TorchScript module without the method {missing[0]}")
    return module
