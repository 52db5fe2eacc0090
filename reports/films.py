"""Films: pictures one after another in a file, WebP, GIF or, by ffmpeg, MP4."""

import errno
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from storage.files import atomic_write

RATE = 16  # pictures a second
HOLD = 20  # times as long the last one stays


def check_writer(kind: str) -> None:
    """Raise ValueError where nothing here writes films of this `kind`, webp, gif or mp4."""
    option = f"sampling.film_format={kind!r}"
    if kind == "mp4" and shutil.which("ffmpeg") is None:
        raise ValueError(f"{option} needs the program ffmpeg, which is not found; 'webp' does not")
    if kind == "webp" and not features.check("webp"):
        raise ValueError(f"{option}: this Pillow is built without WebP; 'gif' needs nothing")


def save_film(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """Write `frames`, each (H, W, 3), as the suffix of `path` says; OSError where it cannot."""
    kind = path.suffix.removeprefix(".")
    with atomic_write(path) as file:
        if kind == "mp4":
            _write_mp4(file, path, frames)
            return
        first, *others = map(Image.fromarray, frames)
        durations = [1000 // RATE] * len(others) + [1000 * HOLD // RATE]
        first.save(
            file, format=kind, save_all=True, append_images=others, duration=durations, loop=0
        )


def _write_mp4(file: BinaryIO, path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """ffmpeg writes to the name of `file`, since an MP4's head is written last."""
    height, width, _ = frames[0].shape
    to_even = ((0, height % 2), (0, width % 2), (0, 0))  # colours are stored at half the size
    frames = [np.pad(frame, to_even, mode="edge") for frame in frames]
    size = f"{width + width % 2}x{height + height % 2}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(RATE), "-i", "-"]
    target = ["-pix_fmt", "yuv420p", "-f", "mp4", str(Path(file.name).absolute())]
    done = subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-y", *source, *target],
        input=b"".join(frame.tobytes() for frame in [*frames, *[frames[-1]] * (HOLD - 1)]),
        capture_output=True,
    )
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()[-200:]
        raise OSError(errno.EIO, f"ffmpeg: {reason or done.returncode}", str(path))
