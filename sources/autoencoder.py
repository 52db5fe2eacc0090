"""A frozen autoencoder in a file, or in two: programs of PyTorch, which are code."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from configs.keys import with_home
from sources import digests
from sources.images import Shape
from storage import programs
from storage.files import one_line

AT_ONCE = 2**22  # most entries of images in one call of a program, to limit memory
PARTS = ("encode", "decode")


class Autoencoder:
    """Functions from images (B, C, H, W), as a network would see them, to latents, and back.

    They are the methods `encode` and `decode` of a TorchScript module or two programs of
    torch.export, in two files whose names have a comma between them. What they return is checked.

    Attributes:
        name: value of `data.codec`.
        data_shape: (C, H, W) of an image.
        shape: (c, h, w) of its latents.
        digest: SHA-256 of the content of the files.
    """

    def __init__(self, name: str, data_shape: Shape):
        self.name, self.data_shape = name, data_shape
        self._functions: dict[torch.device, dict[str, Callable]] = {}
        try:
            self._contents = [programs.read(path) for path in _paths(name)]
        except (OSError, ValueError) as error:
            raise ValueError(f"data.codec={name}: {one_line(error)}") from error
        self.digest = digests.joined(*self._contents)
        blank = torch.zeros(1, *data_shape, device="cpu")
        latents = self._call("encode", blank)
        if latents.dim() != 4:
            raise ValueError(
                f"data.codec={name}: encode gives {tuple(latents.shape)} for {tuple(blank.shape)}, "
                "not latents (B, C, H, W)"
            )
        self.shape: Shape = tuple(latents.shape[1:])
        self.decode(latents)

    def __repr__(self) -> str:
        return f"Autoencoder({self.digest[:32]})"

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, *shape) of `x`, float32; ValueError for another shape, or if not finite."""
        latents = self._call("encode", x, self.shape)
        if not latents.isfinite().all():
            raise ValueError(f"data.codec={self.name}: encode gives numbers that are not finite")
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, *data_shape) of `latents`, float32; ValueError for another shape."""
        return self._call("decode", latents, self.data_shape)

    def _call(self, part: str, x: Tensor, shape: Shape | None = None) -> Tensor:
        title, number = f"data.codec={self.name}: {part}", AT_ONCE // math.prod(self.data_shape)
        if x.device not in self._functions:
            self._functions[x.device] = self._load(x.device)
        function = self._functions[x.device][part]
        try:
            with torch.no_grad():
                y = torch.cat([function(rows).float() for rows in x.split(max(1, number))])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a program may fail in any way
            raise ValueError(f"{title} fails for {tuple(x.shape)}: {one_line(error)}") from error
        if shape and y.shape != (len(x), *shape):
            raise ValueError(
                f"{title} gives {tuple(y.shape)} for {tuple(x.shape)}, not {(len(x), *shape)}"
            )
        return y

    def _load(self, device: torch.device) -> dict[str, Callable]:
        title, are_exported = f"data.codec={self.name}", map(programs.is_exported, self._contents)
        if len(self._contents) == 1 and not any(are_exported):
            module = programs.load_torchscript(self._contents[0], title, device, PARTS)
            return {part: getattr(module, part) for part in PARTS}
        if len(self._contents) != len(PARTS):
            raise ValueError(
                f"{title}: name a TorchScript module, or two programs of torch.export, each of one "
                "function: ENCODER.pt2,DECODER.pt2"
            )
        return {
            part: programs.load_exported(content, title, device)
            for part, content in zip(PARTS, self._contents, strict=True)
        }


def _paths(name: str) -> list[Path]:
    return [Path(path.strip()) for path in with_home("data.codec", name).split(",")]


@functools.lru_cache(2)
def _loaded(name: str, data_shape: Shape, stamps: tuple[tuple[int, int], ...]) -> Autoencoder:
    return Autoencoder(name, data_shape)


def read(name: str, data_shape: Shape) -> Autoencoder:
    """The autoencoder in the files `name`, a value of `data.codec`, for images of `data_shape`.

    It is loaded once, and again after its files have changed. Raises ValueError, in one line, where
    the files cannot be read or loaded, or are no autoencoder of such images.
    """
    stats = [path.stat() for path in _paths(name) if path.exists()]
    return _loaded(name, data_shape, tuple((each.st_size, each.st_mtime_ns) for each in stats))
