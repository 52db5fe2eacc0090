"""report.html: gathers from the files of a run what the page of an evaluation shows."""

import io
import logging
import time
from pathlib import Path

from numpy.typing import NDArray
from PIL import Image

from experiment import Experiment
from metrics.reference import data_name
from metrics.table import METRICS
from reports.page import Picture, render
from storage.files import atomic_write, check_arrays, read_arrays
from storage.tensorboard import read_scalars

log = logging.getLogger(__name__)

PAGE_PIXELS = 1400  # side of the largest picture in report.html

# Below {eval_folder}/, {file}_{k}.png: title and caption on the page.
PICTURES = {
    "ode_images": ("Samples", "The first of those drawn, none chosen."),
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
    "rescale": (
        "Temperature",
        "Each row keeps the direction of a draw of the prior while its norm grows.",
    ),
}


def save_page(config, run: Experiment, workdir: Path, folder: Path, k: int) -> None:
    """report.html: the numbers of all checkpoints in the folder, the pictures of number k."""
    reports = {k: read_report(folder / f"report_{k}.npz")}
    for path in folder.glob("report_*.npz"):
        number = path.stem.removeprefix("report_")
        if number.isdecimal() and int(number) != k:
            try:
                reports[int(number)] = read_report(path)
            except ValueError as error:
                log.warning(f"{error}; it is not used")
    pictures = [
        Picture(title, caption, page_png(path))
        for name, (title, caption) in PICTURES.items()
        if (path := folder / f"{name}_{k}.png").exists()
    ]
    scalars = read_scalars(workdir / "tensorboard")
    parameters = sum(p.numel() for p in run.state.parameters)
    size, channels = config.data.image_size, config.data.num_channels
    facts = {
        "method": type(run.method).__name__,
        "network": f"{config.model.name}, {parameters:,} parameters",
        "data": f"{data_name(config)}, {size} × {size}, {'grey' if channels == 1 else 'colour'}",
        "checkpoint": f"step {run.state.step:,}, EMA weights",
        "sampler": f"{config.sampling.method}, {config.sampling.get('ode_solver', '')}",
        "evaluated": time.strftime("%Y-%m-%d"),
    }
    page = render(
        title=f"{workdir.resolve().name}: evaluation",
        facts=facts,
        reports=dict(sorted(reports.items())),
        shown=k,
        curves={name: scalars.get(f"loss/{name}", []) for name in ("train", "test")},
        pictures=pictures,
        config=config.to_dict(),
    )
    with atomic_write(folder / "report.html") as file:
        file.write(page.encode())


def read_report(path: Path) -> dict[str, NDArray]:
    """The arrays of a report that a page shows; ValueError, in one line, where they do not fit."""
    found, number = read_arrays(path), ("iuf", ())
    metrics = [f"{key}{what}" for key in METRICS for what in ("", "_error", "_data")]
    spec = dict.fromkeys(metrics, number) | {"features": ("U", ())}
    spec = {name: kind for name, kind in spec.items() if name in found}
    spec |= dict.fromkeys(("step", "seconds"), number)
    if "num_samples" in found:
        needed = ("num_samples", "nonfinite", "nfe", "sampling_seconds")
        spec |= dict.fromkeys(needed, number)
    if "bpd_images" in found:
        spec |= dict.fromkeys(("bpd_nfe", "bpd_seconds"), number) | {"bpd_images": ("f", (None,))}
    return check_arrays(path, found, spec, finite=False)


def page_png(path: Path) -> bytes:
    """The picture at `path`, made smaller where it is larger than a page shows."""
    with Image.open(path) as image:
        image.thumbnail((PAGE_PIXELS, PAGE_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
