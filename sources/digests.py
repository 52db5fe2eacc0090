"""Digests of data: SHA-256 by which images are known again without decoding them."""

import hashlib
import logging
import os
import stat
import sys
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sources.base import PerProcess, Source, Unreadable, View
from storage.files import atomic_write, one_line

log = logging.getLogger(__name__)

SAMPLES = 64  # images of a source that has no digest of its own
BLOCKS, BLOCK = 1024, 2**16  # of a large array; what they cover is small, and hashed whole
LARGEST = 2**28  # bytes of a file that are hashed; no image that is read is larger
PIECE = 2**20  # bytes read at once
THREADS, CHUNK = 16, 64  # that read files, and how many files each reads at once
MANY, MUCH = 1000, 2**24  # files, or bytes of them, whose checksums are worth a cache
ROW, KEY = 20, 16  # bytes of an entry of the cache and of its key; a CRC-32 follows
FRESH = 10**8  # ns in which a file may be written twice with one time

Check = tuple[int, int]  # size and CRC-32 of a file


def joined(*parts: str | bytes | NDArray[np.uint8]) -> str:
    """SHA-256, 64 hexadecimal digits, of `parts` in their order, arrays (n,) among them."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()


def of_source(source: Source) -> str:
    """The digest of the images of `source` in their order.

    A source may have its own, `digest()`. An array has that of its bytes (see `of_array`), and any
    other source that of its number of images and of up to 64 of them, so that a change of another
    image goes unseen.
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
    """The digest of the number of images of `source` and of up to 64 of them, decoded."""
    parts: list[str | bytes] = [str(len(source))]
    for i in np.unique(np.linspace(0, len(source) - 1, SAMPLES).astype(int)).tolist():
        try:
            image = np.ascontiguousarray(source[i])
        except Unreadable:
            parts.append("unreadable")
        else:
            parts += [str(image.shape), image.tobytes()]
    return joined(*parts)


def of_array(array: NDArray, whole: bool = False) -> str:
    """The digest of `array`: of all its bytes or, of more than 64 MiB, of 1,024 fixed blocks.

    With `whole` it is that of all bytes however many there are.
    """
    content, blocks = array.ravel(order="K").view(np.uint8), []
    if whole or len(content) <= BLOCKS * BLOCK:
        blocks.append(content)
    else:
        starts = np.linspace(0, len(content) - BLOCK, BLOCKS).astype(int)
        blocks += [content[start : start + BLOCK] for start in starts]
    return joined(array.dtype.str, str(array.shape), *blocks)


def of_words(*words: object, index: NDArray[np.int64]) -> str:
    """The digest of the images `index` of data that `words` describe well enough."""
    return joined(*map(str, words), index.tobytes())


def of_zip(path: Path, index: NDArray[np.int64]) -> str:
    """The digest of the images `index` of arrays in a zip file, by the CRCs in its directory."""
    with zipfile.ZipFile(path) as archive:
        entries = sorted((e.filename, e.file_size, e.CRC) for e in archive.infolist())
    return joined(*(f"{name}\0{size}\0{crc}" for name, size, crc in entries), index.tobytes())


def of_files(
    where: Path,
    archive: PerProcess | None,
    names: list[str],
    beside: Sequence[str],
    content: bool,
    index: NDArray[np.int64],
) -> str:
    """The digest of the files number `index` of `names`, and of those `beside` them.

    It is that of their names, sizes and CRC-32, of an `archive` those in its directory, else those
    of the files below the folder `where`. These are read once and then known by size and time (see
    `_checks`); without `content` they are not read, and only names and sizes count.
    """
    some = [*(names[i] for i in index), *beside]
    if archive is not None:
        entries = map(archive().getinfo, some)
        checks = [(entry.file_size, entry.CRC) for entry in entries]
    else:
        checks = _checks(where, some, content)
    lines = (f"{name}\0{size}\0{crc}\0" for name, (size, crc) in zip(some, checks, strict=True))
    return joined(unicodedata.normalize("NFC", "".join(lines)))


# --- files of a folder ----------------------------------------------------------------------------


def _checks(where: Path, names: list[str], content: bool) -> list[Check]:
    """Size and CRC-32 of the files `names` below `where`; 0 for a CRC that is not computed.

    Checksums of files that have not changed since, by size and times, come from a cache. A file
    that is none, or cannot be read, has the size -1.
    """
    stats = [_stat(f"{where}/{name}") for name in names]
    if not content:
        return [(-1 if s is None else s.st_size, 0) for s in stats]
    path = _cache_path(where)
    cache = _read_cache(path)
    keys = [_key(name, s) for name, s in zip(names, stats, strict=True)]
    missing = [i for i, key in enumerate(keys) if key is not None and key not in cache]
    checks = [
        (-1, 0) if s is None else (s.st_size, cache.get(key, 0))
        for key, s in zip(keys, stats, strict=True)
    ]
    now, size = time.time_ns(), 0
    entries: dict[bytes, int] = {}
    try:
        for i, crc in zip(missing, _crcs(where, [names[i] for i in missing]), strict=True):
            checks[i] = (-1, 0) if crc is None else (stats[i].st_size, crc)
            size += stats[i].st_size
            if crc is not None and now - max(stats[i].st_mtime_ns, stats[i].st_ctime_ns) > FRESH:
                entries[keys[i]] = crc
    finally:  # also where an interrupt ends the reading of many files
        if len(entries) >= MANY or size >= MUCH:
            old = cache if len(cache) < 4 * len(names) else {}  # mostly of files that are no more
            _write_cache(path, old | entries)
    return checks


def _stat(path: str) -> os.stat_result | None:
    try:
        found = os.stat(path)
    except OSError:  # the image counts as unreadable too, and is named then
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _key(name: str, found: os.stat_result | None) -> bytes | None:
    if found is None:
        return None
    words = f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}"
    return hashlib.blake2b(words.encode(errors="surrogatepass"), digest_size=KEY).digest()


def _crcs(where: Path, names: list[str]) -> Iterator[int | None]:
    """The CRC-32 of each file, in this order; None of one that cannot be read."""
    interval = 0.2 if sys.stderr.isatty() else 10
    if not names:
        return
    chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(names), desc="digest", unit="file", delay=1, mininterval=interval) as bar,
    ):
        try:
            for crcs in pool.map(partial(_crcs_of, where), chunks):
                bar.update(len(crcs))
                yield from crcs
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _crcs_of(where: Path, names: list[str]) -> list[int | None]:
    return [_crc(f"{where}/{name}") for name in names]


def _crc(path: str) -> int | None:
    crc, rest = 0, LARGEST
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(min(PIECE, rest)):
                crc, rest = zlib.crc32(piece, crc), rest - len(piece)
    except OSError:  # as in `_stat`
        return None
    return crc


def _cache_path(where: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "pfgm" / f"digests-{joined(str(where.resolve()))[:16]}.npy"


def _read_cache(path: Path) -> dict[bytes, int]:
    """CRC-32 by key; empty where there is no cache, or a damaged one, which is written anew."""
    try:
        if not path.is_file():
            return {}
        rows = np.load(path, allow_pickle=False)
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != ROW:
            raise ValueError(f"it is {rows.dtype} {rows.shape}")
    except (OSError, ValueError, EOFError) as error:
        log.warning(f"{path} is not used: {one_line(error)}")
        return {}
    keys = np.ascontiguousarray(rows[:, :KEY]).tobytes()
    crcs = np.ascontiguousarray(rows[:, KEY:]).view("<u4").ravel().tolist()
    return {keys[i * KEY : (i + 1) * KEY]: crc for i, crc in enumerate(crcs)}


def _write_cache(path: Path, cache: dict[bytes, int]) -> None:
    rows = b"".join(key + crc.to_bytes(4, "little") for key, crc in cache.items())
    # runs on the same data may start at the same time
    mine = path.with_suffix(f".{os.getpid()}.npy")
    try:
        if not path.is_absolute():
            raise FileNotFoundError("there is no home folder")
        with atomic_write(mine) as file:
            np.save(file, np.frombuffer(rows, np.uint8).reshape(-1, ROW))
        mine.replace(path)
    except OSError as error:
        log.warning(f"the checksums of the data are not kept for the next start: {error}")
