"""report.html: gathers from the files of a run what the page of an evaluation shows."""

import logging
import math
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from experiment_parts import Parts
from reports.html import Picture
from reports.images import CLASS_ROWS, SIDE_BY_SIDE, class_rows
from reports.page import render
from reports.plots import number
from reports.report_file import page_png, read_report
from reports.settings import (
    CHOSEN_LEVELS,
    Settings,
    differing,
    guidance_words,
    obstacle,
    of_report,
    solver_words,
)
from sources.codec import Codec
from storage.files import atomic_write, open_regular
from storage.tensorboard import read_scalars, seconds_of_training

log = logging.getLogger(__name__)

T = TypeVar("T")

FILM_BYTES = 2**22  # of the largest film in it

# SAME: settings that must be equal, besides samples and data, where distances are compared. COSTS:
# settings of sampling that decide how many evaluations a sample takes.
SAME = ("step", "weights", "eval.ema_std")
COSTS = tuple(f"sampling.{name}" for name in ("N", "rtol", "atol", "max_evaluations"))
COSTS += (CHOSEN_LEVELS,)

RESTORED_BY = ("sampling.restore", "sampling.restorer")

# Below {eval_folder}/, {file}_{k}.png: title and caption on the page.
PICTURES = {
    "ode_images": ("Samples", "The first of those drawn, none chosen."),
    "data_images": ("Training images", "As many, at random."),
    "nearest": (
        "Nearest training images",
        "Samples, and below each the training image nearest to its features. Upper pair of rows: "
        "the samples closest to the data of all; lower pair: the first samples.",
    ),
    "classes": (
        "Classes",
        "A row for each class, the first ones; the samples of a column start from one draw of the "
        "prior.",
    ),
    "interpolation": ("Interpolation", "Each row follows the arc between two draws of the prior."),
    "restoration": (
        "Restoration",
        "A row for each image: the image itself where it is known, what was measured of it, and "
        "restorations of that.",
    ),
    "pairs": (
        "Pairs",
        "A row for each of the first pairs of the split: the condition, draws from its posterior, "
        "the mean of all draws, the truth.",
    ),
    "rescale": (
        "Temperature",
        "Each row keeps the direction of a draw of the prior while its norm grows.",
    ),
}


def save_page(
    experiment: Parts,
    workdir: Path,
    folder: Path,
    k: int,
    *,
    network: str,
    learning_rate: float,
    warmup: int,
    cooldown: int,
    settings: Mapping[str, Any],
    unit: str = "",
) -> None:
    """Write report.html: the numbers of all checkpoints in the folder, the pictures of number k.

    `network` is its name in papers; the learning rate rises over `warmup` steps and falls over the
    last `cooldown`. `settings` are shown as they are: every key of the config, in nested mappings.
    `unit` is the name of the unit of arrays.
    """
    report = read_report(folder / f"report_{k}.npz")
    reports = {k: report}
    for path in folder.glob("report_*.npz"):
        other = path.stem.removeprefix("report_")
        if other.isdecimal() and int(other) != k and (readable := _readable(path)):
            reports[int(other)] = readable
    step, board = int(report["step"]), workdir / "tensorboard"
    scalars = read_scalars(board)
    paths = {name: folder / f"{name}_{k}.png" for name in PICTURES}
    paths = {name: path for name, path in paths.items() if path.exists()}
    bars = colour_bars(experiment.codec, unit)
    pictures = [_picture(experiment, name, path, bars) for name, path in paths.items()]
    pictures = [picture for picture in pictures if picture]
    samples = folder.glob(f"ckpt_{k}/samples_*.npz")
    files = {
        "numbers of this one": [folder / f"report_{k}.npz"],
        f"samples, {experiment.codec.dtype} (n, H, W, C)": sorted(
            samples, key=lambda path: (len(path.name), path)
        ),
        "pictures, whole": list(paths.values()),
    }
    parameters = sum(p.numel() for p in experiment.network.parameters())
    channels, *sides = experiment.data.shape
    width = f" of width {report['ema_std']:g}" if "ema_std" in report else ""
    cost = [f"{number(report['nfe'])} evaluations"] if "nfe" in report else []
    made_by = of_report(report)
    guided = guidance_words(made_by)
    facts = {
        "method": experiment.method.name,
        "network": f"{network}, {parameters:,} parameters",
        "data": f"{experiment.data.name}, {' × '.join(map(str, sides))}, "
        f"{_colours(sides, channels)}",
        "checkpoint": f"step {step:,}, EMA weights{width}",
        "chosen by": str(report.get("best", "")),
        "initial weights": str(report.get("initial_weights", "")),
        "training time": duration(seconds_of_training(board, step)),
        "learning rate": f"{learning_rate:g}, {warmup:,} steps of warm-up"
        + (f", {cooldown:,} of cooldown" if cooldown else ""),
        "sampler": solver_words(made_by, *cost),
        "classes": _classes(experiment),
        "guidance": guided.removeprefix("guidance ") or "none" * bool(experiment.classes),
        "restored": ", ".join(map(made_by.text, RESTORED_BY)) * ("restore_images" in report),
        "device": _device(experiment.device),
        "commit": _commit(),
        "evaluated": time.strftime("%Y-%m-%d"),
        "command": shlex.join(sys.orig_argv),
    }
    page = render(
        f"{workdir.resolve().name}: evaluation",
        dict(sorted(reports.items())),
        k,
        facts={name: fact for name, fact in facts.items() if fact},
        losses={
            tag.removeprefix("loss/"): points
            for tag, points in scalars.items()
            if tag.startswith("loss/")
        },
        pictures=pictures + _film(folder, workdir, step),
        settings=settings,
        distances=by_evaluations(folder, k, report),
        files={
            name: [path.relative_to(folder).as_posix() for path in group]
            for name, group in files.items()
            if group
        },
    )
    with atomic_write(folder / "report.html") as file:
        file.write(page.encode(errors="backslashreplace"))


def colour_bars(codec: Codec, unit: str = "") -> list[tuple[str, str, str]]:
    """(name, black, white) of pictures of arrays, by channel where these differ; [] of images."""
    windows = dict(enumerate(codec.windows[:SIDE_BY_SIDE]))
    if len({*windows.values()}) == 1:
        windows = {"": windows[0]}

    def text(end: float, width: float) -> str:
        digits = 3 - math.floor(math.log10(width))  # a thousandth of the width, or finer
        return f"{round(end, digits):.12g} {unit}".strip()

    return [
        (f"channel {key}" * (key != ""), text(low, high - low), text(high, high - low))
        for key, (low, high) in windows.items()
    ]


def _picture(experiment: Parts, name: str, path: Path, bars: list) -> Picture | None:
    """The picture at `path`, its rows named by their classes; None if it is damaged."""
    title, caption = PICTURES[name]
    classes, class_label = experiment.classes, experiment.sampler.class_label
    of_class = class_rows(classes, class_label)
    if name in ("ode_images", "data_images") and of_class:
        caption = f"The first of each class{', none chosen' * (name == 'ode_images')}."
    elif name == "ode_images" and classes and class_label < 0:
        caption = "The first of those drawn, none chosen, in the order of their classes."
    elif name != "classes":
        of_class = 0
    rows = min(classes, CLASS_ROWS) if name == "classes" else of_class
    png = _readable(path, page_png)
    return png and Picture(title, caption, png, rows=_class_names(experiment)[:rows], bars=bars)


def _class_names(experiment: Parts) -> list[str]:
    """Names of the classes, or their numbers where they have none."""
    return [*(experiment.data.class_names or map(str, range(experiment.classes)))]


def _classes(experiment: Parts) -> str:
    """The number of classes and the first names; "" without classes."""
    if not experiment.classes:
        return ""
    names = ", ".join(experiment.data.class_names[:CLASS_ROWS])
    more = ", …" * (experiment.classes > CLASS_ROWS)
    return f"{experiment.classes:,}" + (f": {names}{more}" if names else "")


def _colours(sides: Sequence[int], channels: int) -> str:
    if channels in (1, 3):
        return "grey" if channels == 1 else "colour"
    if (*sides, channels) == (1, 1, 2):
        return "points of the plane"
    first = f"the first {SIDE_BY_SIDE} " if channels > SIDE_BY_SIDE else ""
    return f"{channels} channels, {first}side by side in pictures"


def _readable(path: Path, read: Callable[[Path], T] = read_report) -> T | None:
    """The report or picture at `path`; None, and a warning, where it is damaged or gone."""
    try:
        return read(path)
    except (OSError, ValueError) as error:  # another evaluation may have removed it
        log.warning(f"{error}; it is not used")
        return None


def by_evaluations(folder: Path, k: int, current: Mapping) -> dict[str, list[tuple[float, float]]]:
    """{sampler: [(evaluations, Frechet distance)]} of the weights of the report `current`.

    Points come from the reports on checkpoint `k` in `folder` and its sibling folders that have as
    many samples, compared with the same data in the same feature space; the log names the others.
    Samplers that differ only in their `COSTS` make one curve.
    """
    samplers: list[Settings] = []
    points: list[tuple[float, float]] = []
    paths = folder.parent.glob(f"*/report_{k}.npz") if "fid" in current else ()
    for path in sorted(paths):
        report = current if path.parent == folder else _readable(path) or {}
        if not {"fid", "nfe"} <= report.keys():
            continue
        if reason := obstacle("fid", [current, report]) or _of_other_weights(current, report):
            log.info(f"{path} is not among the distances by evaluations: {reason}")
        else:
            samplers.append(of_report(report).without(*COSTS))
            points.append((float(report["nfe"]), float(report["fid"])))
    names, curves = differing(samplers), defaultdict(list)
    for sampler, point in zip(samplers, points, strict=True):
        words = (f"{name.removeprefix('sampling.')}={sampler.text(name)}" for name in names)
        curves[", ".join(words) or solver_words(sampler).partition(",")[0]].append(point)
    return {name: sorted(points) for name, points in curves.items()}


def _of_other_weights(current: Mapping, report: Mapping) -> str:
    """Differences that show that two reports are on different weights; "" if there are none."""
    differ = differing([of_report(current), of_report(report)])
    return ", ".join(f"{name} is {differ[name][1]}" for name in SAME if name in differ)


def _film(folder: Path, workdir: Path, step: int) -> list[Picture]:
    """A film of this step that lies in one of the folders, if it is not too large for a page."""
    for place in (folder, workdir, workdir / f"samples/step_{step}"):
        for kind in ("webp", "gif"):
            path = place / f"film.{kind}"
            if path.is_file() and path.stat().st_size <= FILM_BYTES:
                caption = f"From the prior to images: {path.name}."
                with open_regular(path) as file:
                    return [Picture("Film", caption, file.read(FILM_BYTES), kind)]
    return []


def duration(seconds: float) -> str:
    """A time in its two largest units; "" for none, or one beyond all measure."""
    if not 0 < seconds < 1e9:
        return ""
    rest, words = round(seconds), []
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, unit)
        words += [f"{count} {name}"] * (count > 0)
    return " ".join(words[:2]) or "< 1 s"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return str(device)


def _commit() -> str:
    """The commit of this program, marked where files differ from it; "" where it has none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
