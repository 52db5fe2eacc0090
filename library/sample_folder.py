"""The folder of `--mode sample`: samples, a film of them, encodings, a film between two images.

Existing files are kept; a folder has those of one network and one sampler.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import distributed
from configs.schema import Flag, Key, OneOf, Text
from library.posterior import ToDrawFrom
from library.restoration import ToRestore
from library.trained import Trained
from likelihood import unit_of
from reports.films import save_film
from reports.images import GRID_SAMPLES, image_grid
from reports.progress import progress_bar
from reports.samples import SampleFiles
from samplers.ode import ODESampler
from sampling import spherical_interpolation
from sources.arrays import read_numbers
from sources.codec import Codec, Shape
from sources.dtypes import tensor_of
from sources.folder import read_images
from sources.keyed import keyed_generator
from storage.digests import digests
from storage.files import cached, save_npz, save_png
from storage.workdir import check_settings, save_settings

log = logging.getLogger(__name__)

FILM_SAMPLES = 36  # samples that a film shows
FILM_PIXELS = 192  # least side of a film of one image
FRAMES = 48  # of a film
MAX_SEEDS = 10**6  # of one command
MOST_NAMED = 20  # samples left out that the log names

KEYS = {
    "sampling.seeds": Key(
        "",
        Text(r"|\d{1,15}(-\d{1,15})?(,\d{1,15}(-\d{1,15})?)*", "seeds such as 0-63 or 1,2,5-10"),
        "--mode sample: one sample for each seed, and each condition; '': 0-63; with "
        "sampling.condition 0-4; with sampling.encode or sampling.between none",
    ),
    "sampling.condition": Key(
        "",
        Text(),
        "--mode sample, for a network with data.condition_path: a condition, or a folder, .zip, "
        ".npy or .npz of them: samples from the posterior given each",
        of_machine="file",
    ),
    "sampling.film": Key(
        False, Flag(), "--mode sample: a film of the first 36 seeds from the prior to the image"
    ),
    "sampling.film_format": Key(
        "webp", OneOf(("webp", "gif", "mp4")), "of films; 'mp4' needs the program ffmpeg"
    ),
    "sampling.npz": Key(
        "samples",
        OneOf(("samples", "arr_0")),
        "--mode sample: names of the arrays in samples.npz: samples, seeds and labels; 'arr_0': "
        "what ADM's evaluator takes, uint8 (n, H, W, 3), and labels as arr_1",
    ),
    "sampling.encode": Key(
        "",
        Text(),
        "--mode sample: an image, or a folder, .zip, .npy or .npz of them: latents, bits/dim, "
        "reconstructions",
        of_machine="file",
    ),
    "sampling.between": Key(
        "",
        Text(),
        "--mode sample: two images A.png,B.png: a film that leads from one to the other",
        of_machine="file",
    ),
}


@dataclass(frozen=True)
class SampleFolder:
    """The results of `--mode sample` in a folder.

    Attributes:
        trained: the network that draws.
        path: of the folder.
        settings: those that all files of the folder share, a flat dictionary.
        source: the images to restore, or the conditions to draw from; None: neither.
        film_format: of films, the suffix of their files.
        names: `sampling.npz`.
    """

    trained: Trained
    path: Path
    settings: dict[str, Any]
    source: ToRestore | ToDrawFrom | None = None
    film_format: str = "webp"
    names: str = "samples"

    @functools.cached_property
    def files(self) -> SampleFiles:
        """The files of the seeds."""
        (channels, *sides), codec = self.trained.shape, self._codec
        return SampleFiles(self.path, (*sides, channels), codec.dtype, codec.pictures)

    @property
    def _codec(self) -> Codec:
        return self.trained.experiment.codec

    def check(self) -> bool:
        """Whether the folder has files of these settings.

        Raises:
            ValueError: it has samples of other settings, or `names` is for other data.
            NotADirectoryError: it is a file.
        """
        channels = self.trained.shape[0]
        if self.names == "arr_0" and (self._codec.dtype != "uint8" or channels not in (1, 3)):
            raise ValueError(
                f"sampling.npz='arr_0' is for images of 8 bits, of 1 or 3 channels; these have "
                f"{channels} of {self._codec.dtype}: sampling.npz='samples' takes them"
            )
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"--outdir={self.path} is a file; name a folder")
        return check_settings(self.path, self.settings)

    def save_settings(self) -> None:
        """Write the settings, by which the next start recognises the folder."""
        save_settings(self.path, self.settings)

    def plan(
        self, seeds: list[int], film: bool, encoded: Collection[str], ends: Collection[str]
    ) -> str:
        """Text on what would be drawn: samples, a film, images `encoded`, a film between `ends`."""
        numbers = self.source.numbers(seeds) if self.source else seeds
        number = len(numbers) - len(self.files.missing(numbers))
        parts = [f"{len(numbers)} samples, {number} of which are there"] * bool(seeds)
        parts += [f"a film of {min(len(numbers), FILM_SAMPLES)}"] * bool(seeds and film)
        parts += [f"{len(encoded)} images encoded"] * bool(encoded)
        parts += [f"a film between {' and '.join(ends)}"] * bool(ends)
        return "; ".join(parts)

    def draw(self, seeds: list[int], film: bool = False) -> None:
        """The files of the seeds, samples.npz, grid.png and, if asked for, the film.

        Samples that are given up one by one, as field lines are, are left out, and a warning names
        them; restorations and draws for conditions are all needed. Several processes share the
        seeds. Raises FloatingPointError where the solver diverges, and where no sample is left.
        """
        trained, files, source = self.trained, self.files, self.source
        numbers = source.numbers(seeds) if source else seeds
        number_before = len(numbers) - len(files.missing(numbers))
        distributed.barrier()  # nobody writes before all have counted
        if film:
            if distributed.is_main():
                self._draw_film(numbers[:FILM_SAMPLES])
            distributed.barrier()
        missing = files.missing(numbers[distributed.rank() :: distributed.world()])
        sampler = trained.experiment.sampler
        if isinstance(sampler, ODESampler) and sampler.couples_samples and len(missing) > 1:
            log.info(
                "this sampler has one step size for all it draws, so each sample is drawn alone; "
                "sampling.ode_solver=heun with sampling.N=18 draws them together"
            )
        with progress_bar(total=len(missing), desc="sampling", unit="image") as progress:
            for start in range(0, len(missing), trained.at_once):
                batch = missing[start : start + trained.at_once]
                options = {**self._arguments(batch), "strict": source is not None}
                samples = trained.sample(self._seeds_of(batch), **options)
                finite = samples.flatten(1).isfinite().all(1).cpu()
                stored = self._codec.stored(samples[finite])
                for number, sample in zip(itertools.compress(batch, finite), stored, strict=True):
                    files.save(number, sample)
                progress.update(len(batch))
        distributed.barrier()
        if not distributed.is_main():
            return
        numbers = self._drawn(numbers)
        samples = files.read(numbers)
        of_noise = self._seeds_of(numbers)
        class_label = self._arguments(numbers).get("class_label")
        labels = trained.labels(class_label, len(numbers), of_noise)
        arrays = {"samples": samples, "seeds": np.array(of_noise)}
        if self.names == "arr_0":
            arrays = {"arr_0": np.broadcast_to(samples, (*samples.shape[:3], 3))}
        if labels is not None:
            name = "labels" if self.names == "samples" else "arr_1"
            arrays[name] = labels.cpu().numpy()
        save_npz(self.path / "samples.npz", **arrays)
        if isinstance(source, ToDrawFrom):
            picture = source.save(self.path, samples, self._codec)
            log.info(f"{source.number} conditions, {len(seeds)} draws of each: {picture}")
        grid, columns = self.path / "grid.png", min(source.number, 20) if source else None
        save_png(grid, image_grid(self._codec.pictures(samples[:GRID_SAMPLES]), columns))
        log.info(f"{len(numbers)} samples, {number_before} of which were there: {grid}")

    def _drawn(self, numbers: list[int]) -> list[int]:
        """The `numbers` that have a sample, of which all were to be drawn.

        A warning names the others; FloatingPointError where none has one.
        """
        lost = self.files.missing(numbers)
        if not lost:
            return numbers
        seeds = ", ".join(map(str, lost[:MOST_NAMED])) + ", ..." * (len(lost) > MOST_NAMED)
        words = (
            f"{len(lost)} of {len(numbers)} samples are not finite and left out (seeds {seeds}): "
            "raise sampling.max_evaluations, or train the network longer"
        )
        if len(lost) == len(numbers):
            raise FloatingPointError(words)
        log.warning(words)
        lost = {*lost}
        return [number for number in numbers if number not in lost]

    def _seeds_of(self, numbers: list[int]) -> list[int]:
        """The seeds from which the noise of samples number `numbers` comes."""
        return self.source.seeds(numbers) if self.source else numbers

    def _arguments(self, numbers: list[int]) -> dict[str, Any]:
        """Further arguments of `Trained.sample` for samples number `numbers`."""
        return self.source.arguments(numbers) if self.source else {}

    def _draw_film(self, numbers: list[int]) -> None:
        def draw() -> dict:
            options = {**self._arguments(numbers), "frames": FRAMES}
            frames, samples = self.trained.film_and_samples(self._seeds_of(numbers), **options)
            finite = samples.flatten(1).isfinite().all(1)
            return {"frames": frames.permute(0, 1, 3, 4, 2).numpy(), "finite": finite.cpu().numpy()}

        n = len(numbers)
        film = self._cached_film("film", {"film": numbers}, draw, (FRAMES, n), finite=("b", (n,)))
        finite = film["finite"]
        numbers, frames = [*itertools.compress(numbers, finite)], film["frames"][:, finite]
        if self.files.dtype == "uint8":  # else the frames are no samples but pictures of them
            for number in self.files.missing(numbers):
                self.files.save(number, frames[-1][numbers.index(number)])
        if not numbers:
            return  # `draw` says so
        path = self.path / f"film.{self.film_format}"
        save_film(path, [image_grid(frame) for frame in frames])
        log.info(f"film: {path}")

    def encode(self, arrays: Mapping[str, NDArray], divergence: str) -> None:
        """encoded.npz: latents, bits/dim or nats, reconstructions; encoded.png: these in pairs.

        Args:
            arrays: images as stored (H, W, C), by name.
            divergence: of the likelihood, which is part of what the results depend on.
        """
        trained, codec, unit = self.trained, self._codec, unit_of(self._codec)
        names, stack = [*arrays], np.stack([*arrays.values()])
        images = tensor_of(stack)

        def compute() -> dict:
            generator = keyed_generator("cpu", "dequantisation", 0)
            values = trained.bits_per_dim(codec.dequantized(images, generator))
            latents = trained.encode(codec.units(images))
            return {
                "names": np.array(names),
                "latents": latents.cpu().numpy(),
                unit.key: values.double().cpu().numpy(),
                "decoded": codec.stored(trained.decode(latents)),
            }

        origin = self.settings | digests(encoded=images)
        origin |= {"names": names, "divergence": divergence}
        results = cached(self.path / "encoded.npz", origin, compute, (unit.key, "decoded"))
        for name, value in zip(names, results[unit.key], strict=True):
            log.info(f"{name}: {value:.4g} {unit.name}")
        columns, strips = min(len(names), 10), []
        before, after = codec.pictures(stack), codec.pictures(results["decoded"])
        for start in range(0, len(names), columns):
            pair = [rows[start : start + columns] for rows in (before, after)]
            blank = np.full((columns - len(pair[0]), *stack.shape[1:]), 128, np.uint8)
            strips.append(image_grid(np.concatenate([pair[0], blank, pair[1], blank]), columns))
        path = self.path / "encoded.png"
        save_png(path, np.concatenate(strips))
        change = np.abs(results["decoded"].astype(float) - stack).max()
        apart = f"{change:g}" + " grey levels" * (codec.dtype == "uint8")
        log.info(f"images and reconstructions, {apart} apart: {path}")

    def draw_between(self, ends: Mapping[str, NDArray]) -> None:
        """A film along the arc between the latents of two images as stored (H, W, C), by name."""
        images, codec = tensor_of(np.stack([*ends.values()])), self._codec

        def draw() -> dict:
            latents = self.trained.encode(codec.units(images))
            shares = torch.linspace(0, 1, FRAMES, device=latents.device)
            (arc,) = spherical_interpolation(latents[:1], latents[1:], shares)
            return {"frames": codec.pictures(codec.stored(self.trained.decode(arc)))}

        frames = self._cached_film("between", digests(between=images), draw, (FRAMES,))["frames"]
        path = self.path / f"between.{self.film_format}"
        save_film(path, [image_grid(frame[None], min_size=FILM_PIXELS) for frame in frames])
        log.info(f"film between {' and '.join(ends)}: {path}")

    def _cached_film(
        self,
        name: str,
        origin: dict,
        draw: Callable[[], dict],
        number: tuple[int, ...],
        **others: tuple[str, tuple[int, ...]],
    ) -> dict[str, NDArray]:
        """The `frames` (*number, H, W, C) of a film from {name}.npz, or drawn.

        The `others` are further arrays that it has, kinds and shapes by name.
        """
        spec = {"frames": ("u", (*number, *self.files.shape)), **others}
        return cached(self.path / f"{name}.npz", self.settings | origin, draw, spec=spec)


def read_encoded(
    text: str, shape: Shape, scale: tuple[float, ...] = (), layout: str = ""
) -> dict[str, NDArray]:
    """The images of `sampling.encode`, by name; see `read_pictures`."""
    return read_pictures("sampling.encode", [text] if text else [], shape, scale, layout)


def read_pair(
    text: str, shape: Shape, scale: tuple[float, ...] = (), layout: str = ""
) -> dict[str, NDArray]:
    """The two images of `sampling.between`, by name; none where it is empty.

    Raises:
        ValueError: they are not two; and as `read_pictures`.
    """
    names = pair_of(text) if text else []
    ends = read_pictures("sampling.between", names, shape, scale, layout)
    if names and len(ends) != 2:
        raise ValueError(f"sampling.between={text} must be two images, A.png,B.png")
    return ends


def read_pictures(
    key: str,
    names: list[str],
    shape: Shape,
    scale: tuple[float, ...] = (),
    layout: str = "",
) -> dict[str, NDArray]:
    """The images of files and folders `names` by name, (H, W, C), uint8 or as stored.

    Args:
        key: the key that names them, for errors.
        shape: (C, H, W) that they must have.
        scale: of 16-bit images; see `sources.sixteen_bits`.
        layout: of arrays in units of their own, `data.layout`; "" for images.

    Raises:
        ValueError: an image has another size, or cannot be read.
        OSError: there is no such file.
    """
    channels, *size = shape
    pictures: dict[str, NDArray] = {}
    for name in map(str.strip, names):
        if layout:
            images = read_numbers(key, Path(name), (*size, channels), layout)
        else:
            images = read_images(key, name, channels, scale)
        for file, picture in images.items():
            if picture.shape[:2] != tuple(size):
                has, needs = (" x ".join(map(str, sides)) for sides in (picture.shape[:2], size))
                raise ValueError(f"{key}: {file} has {has} pixels, the network's images {needs}")
            pictures[file if file not in pictures else f"{name}:{file}"] = picture
    return pictures


def pair_of(text: str) -> list[str]:
    """The names in `sampling.between`: two at a comma, or a file or folder that has both images.

    Where there are several commas, it is the one on both sides of which there are files.

    Raises:
        ValueError: there is no such comma, or more than one.
    """
    pieces = text.split(",")
    cuts = range(1, len(pieces))
    pairs = [[",".join(part).strip() for part in (pieces[:i], pieces[i:])] for i in cuts]
    if not pairs or Path(text).exists():
        return [text]
    if len(pairs) == 1:
        return pairs[0]
    present = [pair for pair in pairs if all(Path(name).exists() for name in pair)]
    if len(present) != 1:
        names = "several pairs of files" if present else "no two files"
        raise ValueError(f"sampling.between={text} must be two images, A.png,B.png: it is {names}")
    return present[0]


def default_seeds(sampling: Mapping[str, Any]) -> str:
    """The seeds that an empty `sampling.seeds` stands for."""
    if sampling["encode"] or sampling["between"]:
        return ""
    return "0-4" if sampling["condition"] else "0-63"


def seeds_of(text: str) -> list[int]:
    """The seeds that `sampling.seeds` names, such as "0-63" or "1,2,5-10", each once.

    Raises:
        ValueError: a range falls, or there are more than `MAX_SEEDS`.
    """
    seeds: dict[int, None] = {}
    for piece in text.split(",") if text else ():
        first, _, last = piece.partition("-")
        first, last = int(first), int(last or first)
        if first > last:
            raise ValueError(f"sampling.seeds={text:.100}: the range {piece} falls")
        if last - first < MAX_SEEDS:
            seeds |= dict.fromkeys(range(first, last + 1))
        if last - first >= MAX_SEEDS or len(seeds) > MAX_SEEDS:
            raise ValueError(f"sampling.seeds={text:.100} are more than {MAX_SEEDS:,}")
    return [*seeds]
