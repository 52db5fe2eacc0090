"""Image files of a folder or zip, each read when it is indexed."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from sources.base import PerProcess, Picture, Unreadable
from sources.images import Header, decode_image, extent_of_16_bits, read_header
from sources.sixteen_bits import Measured, Range, measure
from storage.files import one_line, open_entry

T = TypeVar("T")

MAX_FILE_BYTES = 2**28  # of one image, as it is read or unpacked; Pillow bounds the pixels


@dataclass(frozen=True)
class Files:
    """Image files by name, each opened by `open`; nothing is extracted to disk.

    `channels` and `scale` are those of `decode_image`. `headers` are those read so far.
    """

    where: Path
    names: list[str]
    open: Callable[[str], IO[bytes]]
    channels: int = 0
    scale: Range | tuple[()] = ()
    headers: dict[int, Header] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Picture:
        decode = partial(decode_image, channels=self.channels, scale=self.scale)
        return self._read(i, lambda file: decode(read_bounded(file)))

    def header(self, i: int) -> Header:
        """The header of image i; `Unreadable` where it cannot be read."""
        if i not in self.headers:
            self.headers[i] = self._read(i, read_header)
        return self.headers[i]

    def measure_scale(self, watch: Callable[[Iterable[int]], Iterable[int]] = iter) -> Measured:
        """The scale of 16-bit images among them; see `sixteen_bits.measure`."""
        try:
            return measure(len(self), self._may_have_16_bits, self._extent, watch)
        except ValueError as error:
            raise ValueError(f"the images of {self.where}: {error}") from error

    # an image that cannot be read is reported when it is decoded

    def _may_have_16_bits(self, i: int) -> bool:
        with contextlib.suppress(Unreadable):
            return self.header(i).may_have_16_bits
        return False

    def _extent(self, i: int) -> tuple[int, int] | None:
        with contextlib.suppress(Unreadable):
            return self._read(i, lambda file: extent_of_16_bits(read_bounded(file)))
        return None

    def _read(self, i: int, parse: Callable[[IO[bytes]], T]) -> T:
        try:
            with self.open(self.names[i]) as file:
                return parse(file)
        except Exception as error:  # a damaged file makes the decoder fail in any way
            raise Unreadable(f"{self.where}/{self.names[i]}: {one_line(error)}") from error


def read_bounded(file: IO[bytes]) -> bytes:
    """The bytes of a file; ValueError where there are more than `MAX_FILE_BYTES`."""
    content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return content


def open_below(folder: Path, name: str) -> IO[bytes]:
    """A regular file below `folder`; ValueError where it is none."""
    path = folder / name
    if not path.is_file():  # a pipe or a device could be read for ever
        raise ValueError("not a file")
    return open(path, "rb")


def open_in(archive: PerProcess, name: str) -> IO[bytes]:
    """The entry `name` of a zip file; raises as `open_entry`."""
    return open_entry(archive(), name)
