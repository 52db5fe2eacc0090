"""Image files of a folder or zip, each read when it is indexed."""

import contextlib
import gzip
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from sources.base import PerProcess, Picture, Unreadable, spread
from sources.images import Header, decode_image, decode_numbers, extent_of_16_bits, read_header
from sources.sixteen_bits import WHOLE, Range, range_of_bits
from storage.files import one_line, open_entry, open_regular

T = TypeVar("T")

GZIP = b"\x1f\x8b"  # the first bytes of a file that gzip packed
MAX_FILE_BYTES = 2**28  # of one image, as it is read or unpacked; Pillow bounds the pixels
LOOKED_AT = 64  # images of a set whose headers tell whether any have 16 bits


class Measured(NamedTuple):
    """The `scale` of a set of images and, where some have 16 bits, a line on it."""

    scale: Range | tuple[()]
    line: str | None = None


@dataclass(frozen=True)
class Files:
    """Image files by name, each opened by `open`; nothing is extracted to disk.

    `channels` and `scale` are those of `decode_image`; with a `dtype` images are numbers of that
    type (`decode_numbers`). `headers` are those read so far.
    """

    where: Path
    names: list[str]
    open: Callable[[str], IO[bytes]]
    channels: int = 0
    scale: Range | tuple[()] = ()
    dtype: str = ""
    headers: dict[int, Header] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Picture:
        if self.dtype:
            decode = partial(decode_numbers, channels=self.channels, dtype=self.dtype)
        else:
            decode = partial(decode_image, channels=self.channels, scale=self.scale)
        return self._read(i, lambda file: decode(read_bounded(file)))

    def header(self, i: int) -> Header:
        """The header of image i; `Unreadable` where it cannot be read."""
        if i not in self.headers:
            self.headers[i] = self._read(i, read_header)
        return self.headers[i]

    def measure_scale(self, watch: Callable[[Iterable[int]], Iterable[int]] = iter) -> Measured:
        """`range_of_bits` of the largest value in these images; () where none has 16 bits.

        Up to `LOOKED_AT` headers, spread evenly, are read first; if none has 16 bits, no more is
        read. Reading also ends once a value needs all bits. `watch` shows the progress of a loop
        over the images, such as `tqdm`. Raises ValueError where a value is below 0.
        """
        if not self.have_16_bits:
            return Measured(())
        smallest, largest, first = 0, 0, self._looked_at
        for i in watch([*first, *sorted({*range(len(self))} - {*first})]):
            with contextlib.suppress(Unreadable):  # reported when it is decoded
                low, high = self._read(i, lambda file: extent_of_16_bits(read_bounded(file)))
                smallest, largest = min(smallest, low), max(largest, high)
            if smallest < 0 or largest > WHOLE[1] // 2:
                break
        try:
            scale = range_of_bits(smallest, largest)
        except ValueError as error:
            raise ValueError(f"the images of {self.where}: {error}") from error
        bits = (scale[1] + 1).bit_length() - 1
        top = f"{scale[1] if scale == WHOLE else largest:,}"
        line = f"16-bit images: values up to {top} count as {bits} bits (data.scale)"
        return Measured(scale, line)

    @property
    def have_16_bits(self) -> bool:
        """True where one of up to `LOOKED_AT` headers has more than 8 bits for each channel."""
        return any(map(self._may_have_16_bits, self._looked_at))

    @property
    def _looked_at(self) -> list[int]:
        """Numbers of up to `LOOKED_AT` images, spread evenly."""
        return spread(len(self), LOOKED_AT)

    def _may_have_16_bits(self, i: int) -> bool:
        try:
            return self.header(i).may_have_16_bits
        except Unreadable:  # reported when it is decoded
            return False

    def _read(self, i: int, parse: Callable[[IO[bytes]], T]) -> T:
        try:
            with self.open(self.names[i]) as file:
                return parse(file)
        except Exception as error:  # a damaged file makes the decoder fail in any way
            raise Unreadable(f"{self.where}/{self.names[i]}: {one_line(error)}") from error


def read_bounded(file: IO[bytes], limit: int | None = None) -> bytes:
    """The bytes of a file; ValueError for more than `limit`, by default `MAX_FILE_BYTES`."""
    limit = limit or MAX_FILE_BYTES
    content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit >> 20} MiB")
    return content


def unpacked(file: IO[bytes]) -> IO[bytes]:
    """The content of an open file from its beginning, unpacked if gzip packed it."""
    file.seek(0)
    is_packed = file.read(2) == GZIP
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_packed else file


def open_below(folder: Path, name: str) -> IO[bytes]:
    """The regular file `name` below `folder`; raises as `open_regular`."""
    return open_regular(folder / name)


def open_in(archive: PerProcess, name: str) -> IO[bytes]:
    """The entry `name` of a zip file; raises as `open_entry`."""
    return open_entry(archive(), name)
