"""Digests of data: SHA-256 that identify images without decoding them."""

import hashlib
import logging
import os
import stat
import sys
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sources.base import PerProcess, Source, Unreadable, View, spread
from storage.files import atomic_write, one_line, sparing_time

log = logging.getLogger(__name__)

SAMPLES = 64  # images of a source that has no digest of its own
BLOCKS, BLOCK = 1024, 2**16  # of a large array; an array no larger than them is hashed whole
LARGEST = 2**28  # bytes of a file that are hashed; larger images are never read
PIECE = 2**20  # bytes read at once
THREADS, CHUNK = 16, 64  # threads that read files, and files in a task of a thread
MANY, MUCH = 1000, 2**24  # files, or bytes of them, from which on checksums are cached
CACHE = "digests-{}.npy"  # of checksums, for `cache_path`
KEY = 8  # bytes of the hash of a file's name, size and times in the cache
FRESH = 10**8  # ns in which a file may be written twice with one time

Numbers = NDArray[np.int64]


def joined(*parts: str | bytes | NDArray[np.uint8]) -> str:
    """SHA-256, 64 hexadecimal digits, of `parts` in order: strings, bytes or arrays (n,)."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()


def of_source(source: Source) -> str:
    """The digest of the images of `source` in their order.

    It is the source's `digest()`, or `of_array`, or else `of_samples`.
    """
    if isinstance(source, View):
        if source.digest_of is not None:
            return source.digest_of(source.index)
        return joined(of_source(source.source), np.ascontiguousarray(source.index).tobytes())
    if hasattr(source, "digest"):
        return source.digest()
    if isinstance(source, PerProcess):
        return of_source(source())
    return of_array(source) if isinstance(source, np.ndarray) else of_samples(source)


def of_samples(source: Source) -> str:
    """The digest of the number of images and of up to 64 of them; other changes go unseen."""
    parts = [str(len(source))]
    for i in spread(len(source), SAMPLES):
        try:
            image = np.ascontiguousarray(source[i])
        except Unreadable:
            parts.append("unreadable")
        else:
            parts += [str(image.shape), image.tobytes()]
    return joined(*parts)


def of_array(array: NDArray, whole: bool = False) -> str:
    """The digest of all bytes of `array` or, above 64 MiB unless `whole`, of 1,024 blocks."""
    content = array.ravel(order="K").view(np.uint8)

    def read(start: int, size: int) -> NDArray[np.uint8]:
        return content[start : start + size]

    return of_blocks(array.dtype, array.shape, len(content), read, whole)


def of_blocks(
    dtype: np.dtype,
    shape: tuple[int, ...],
    size: int,
    read: Callable[[int, int], bytes | NDArray[np.uint8]],
    whole: bool = False,
) -> str:
    """The digest of an array of `size` bytes, of which `read(start, size)` gives any."""
    starts, length = [0], size
    if not whole and size > BLOCKS * BLOCK:
        starts, length = spread(size - BLOCK + 1, BLOCKS), BLOCK
    return joined(dtype.str, str(shape), *(read(start, length) for start in starts))


def of_words(words: Sequence[str], index: Numbers) -> str:
    """The digest of the images `index` of data that `words` identify."""
    return joined(*words, index.tobytes())


def of_zip(path: Path, index: Numbers) -> str:
    """The digest of the images `index` of arrays in a zip file, by the CRCs in its directory."""
    with zipfile.ZipFile(path) as archive:
        entries = sorted((e.filename, e.file_size, e.CRC) for e in archive.infolist())
    return of_words([f"{name}\0{size}\0{crc}" for name, size, crc in entries], index)


def of_entries(archive: zipfile.ZipFile, names: list[str]) -> str:
    """The digest of names, sizes and CRC-32 of entries of a zip, which are in its directory."""
    entries = [archive.getinfo(name) for name in names]
    sizes = np.array([entry.file_size for entry in entries], np.int64)
    return _of_checks(names, sizes, np.array([entry.CRC for entry in entries], np.int64))


def of_files(
    where: Path, names: list[str], content: bool, limit: int, largest: int | None = LARGEST
) -> str:
    """The digest of names, sizes and CRC-32 of the files `names` below `where`.

    Without `content` no file is read, and only names and sizes count. Checksums of files with
    unchanged size and times come from a cache, which is emptied when it has `limit` entries. Of a
    file the first `largest` bytes are read, None for all. What is no file, or cannot be read, has
    the size -1.
    """
    stats = [_stat(f"{where}/{name}") for name in names]
    sizes = np.array([-1 if s is None else s.st_size for s in stats], np.int64)
    crcs = np.zeros(len(names), np.int64)
    if content:
        crcs = _cached_crcs(where, names, stats, limit, largest)
        sizes[crcs < 0] = -1
    return _of_checks(names, sizes, crcs.clip(0))


def _of_checks(names: list[str], sizes: Numbers, crcs: Numbers) -> str:
    words = unicodedata.normalize("NFC", "\0".join(names))
    return joined(words, sizes.tobytes(), crcs.tobytes())


# --- files of a folder ----------------------------------------------------------------------------


def _cached_crcs(
    where: Path,
    names: list[str],
    stats: list[os.stat_result | None],
    limit: int,
    largest: int | None,
) -> Numbers:
    """CRC-32 of each file, from the cache where it has them; -1 where one cannot be read."""
    cache = _read_cache(where)
    keys = np.frombuffer(b"".join(map(_key, names, stats)), np.int64)
    at = np.searchsorted(cache[:, 0], keys).clip(max=len(cache) - 1)
    crcs = np.where(cache[at, 0] == keys, cache[at, 1], -1)
    missing = [i for i in np.flatnonzero(crcs < 0) if stats[i]]
    amount, now, entries = sum(stats[i].st_size for i in missing), time.time_ns(), []
    try:
        of_missing = _crcs(where, [names[i] for i in missing], largest)
        for i, crc in zip(missing, of_missing, strict=True):
            crcs[i] = crc
            if crc >= 0 and now - max(stats[i].st_mtime_ns, stats[i].st_ctime_ns) > FRESH:
                entries.append((keys[i], crc))
    finally:  # also where an interrupt ends the reading of many files
        if entries and (len(missing) >= MANY or amount >= MUCH):
            old = cache if len(cache) < limit else cache[:1]  # drops stale entries
            _write_cache(where, np.concatenate([old, entries]))
    return crcs


def _stat(path: str) -> os.stat_result | None:
    try:
        status = os.stat(path)
    except OSError:  # the image is reported as unreadable when it is decoded
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _key(name: str, status: os.stat_result | None) -> bytes:
    if status is None:
        return bytes(KEY)
    words = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
    return hashlib.blake2b(words.encode(errors="surrogatepass"), digest_size=KEY).digest()


def _crcs(where: Path, names: list[str], largest: int | None) -> Iterator[int]:
    """CRC-32 of each file, in order; -1 for a file that cannot be read."""
    if not names:
        return
    chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
    interval = 0.2 if sys.stderr and sys.stderr.isatty() else 10
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(names), desc="digest", unit="file", delay=1, mininterval=interval) as bar,
    ):
        try:
            paths = ([f"{where}/{name}" for name in chunk] for chunk in chunks)
            for crcs in pool.map(lambda chunk: [_crc(path, largest) for path in chunk], paths):
                bar.update(len(crcs))
                yield from crcs
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _crc(path: str, largest: int | None) -> int:
    crc, rest = 0, sys.maxsize if largest is None else largest
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(min(PIECE, rest)):
                crc, rest = zlib.crc32(piece, crc), rest - len(piece)
    except OSError:  # as in `_stat`
        return -1
    return crc


def cache_path(where: Path, name: str) -> Path:
    """Path of a cache file on the data at `where`; {} in its `name` becomes a digest of that."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "pfgm" / name.format(joined(str(where.resolve()))[:16])


def _read_cache(where: Path) -> Numbers:
    """Keys and CRC-32 (n, 2) by rising keys; the row (0, 0) for a missing or damaged cache."""
    path = cache_path(where, CACHE)
    try:
        if path.is_file():
            return np.load(path, allow_pickle=False).reshape(-1, 2)
    except (OSError, ValueError, EOFError) as error:
        log.warning(f"{path} is not used: {one_line(error)}")
    return np.zeros((1, 2), np.int64)


def _write_cache(where: Path, cache: Numbers) -> None:
    path = cache_path(where, CACHE)
    own_path = path.with_suffix(f".{os.getpid()}.npy")  # runs on the same data may start together
    with sparing_time("the checksums of the data are"):
        if not path.is_absolute():
            raise FileNotFoundError("there is no home folder")
        with atomic_write(own_path) as file:
            np.save(file, cache[np.argsort(cache[:, 0], kind="stable")])
        own_path.replace(path)
