"""report.html: gathers from the files of a run what the page of an evaluation shows."""

import io
import time
from pathlib import Path

from PIL import Image

from experiment import Experiment
from metrics.reference import data_name
from reports.page import Picture, render
from storage.files import atomic_write, read_arrays_if_whole
from storage.tensorboard import read_scalars

PAGE_PIXELS = 1400  # side of the largest picture in report.html

# Below {eval_folder}/, {file}_{k}.png: title and caption on the page.
PICTURES = {
    "ode_images": ("Samples", "The first of those drawn, none chosen."),
    "nearest": (
        "Nearest training images",
        "Samples, and below each the training image nearest to its features. Upper pair of rows: "
        "the samples closest to the data of all; lower pair: the first samples.",
    ),
    "interpolation": ("Interpolation", "Each row follows the arc between two draws of the prior."),
    "rescale": (
        "Temperature",
        "Each row keeps the direction of a draw of the prior while its norm grows.",
    ),
}


def save_page(config, run: Experiment, workdir: Path, folder: Path, k: int) -> None:
    """report.html: the numbers of all checkpoints in the folder, the pictures of number k."""
    reports = {}
    for path in folder.glob("report_*.npz"):
        number = path.stem.removeprefix("report_")
        if number.isdigit() and (found := read_arrays_if_whole(path)):
            reports[int(number)] = found
    pictures = [
        Picture(title, caption, _page_png(path))
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


def _page_png(path: Path) -> bytes:
    """The picture at `path`, made smaller where it is larger than a page shows."""
    with Image.open(path) as image:
        image.thumbnail((PAGE_PIXELS, PAGE_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
