"""Files of an evaluation, read and checked for a page: report_{k}.npz, and pictures."""

import io
import os
from pathlib import Path

from numpy.typing import NDArray

from metrics.table import METRICS, split_key
from reports import paired
from reports.settings import of_report
from reports.table import RESTORED, likelihood_of
from sources.images import open_image, refuse_bomb
from storage.files import check_arrays, open_regular, read_arrays, refusing

TEXTS = ("features", "sampling", "settings", "initial_weights", "best")  # entries that are text
OF_METRIC = ("", "_error", "_low", "_high", "_min", "_max", "_data")  # suffixes of a metric's keys
PAGE_PIXELS = 1400  # side of the largest picture on a page


def read_report(path: Path) -> dict[str, NDArray]:
    """The arrays of a report that a page shows; ValueError, in one line, where they do not fit."""
    arrays, scalar = read_arrays(path), ("iuf", ())
    metrics = [f"{key}{what}" for key in METRICS for what in OF_METRIC]
    spec = dict.fromkeys((*metrics, "half_first", "half_other"), scalar)
    spec |= {name: scalar for name in arrays if split_key(name)[1] in spec}  # in further spaces
    spec |= dict.fromkeys(("ema_std", "repeats"), scalar) | dict.fromkeys(TEXTS, ("U", ()))
    spec |= dict.fromkeys((name for name in arrays if name.endswith("_remark")), ("U", ()))
    spec = {name: kind for name, kind in spec.items() if name in arrays}
    spec |= dict.fromkeys(("step", "seconds"), scalar)
    if "num_samples" in arrays:
        needed = ("num_samples", "nonfinite", "sampling_seconds", *({"nfe"} & arrays.keys()))
        spec |= dict.fromkeys(needed, scalar)
    if f"{(unit := likelihood_of(arrays))}_images" in arrays:
        spec |= dict.fromkeys((f"{unit}_nfe", f"{unit}_seconds"), scalar)
        spec |= {f"{unit}_images": ("f", (None,))}
    if "restore_images" in arrays:
        spec |= dict.fromkeys(("restore_images", "restore_seconds"), scalar)
        spec |= dict.fromkeys(RESTORED.keys() & arrays.keys() | {"restore_nfe"}, scalar)
    spec |= dict.fromkeys(paired.scalars(arrays), scalar)
    if "pairs_ranks" in arrays:
        spec["pairs_ranks"] = ("f", (None,))
    report = check_arrays(path, arrays, spec, finite=False)
    try:
        of_report(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return report


def page_png(path: Path) -> bytes:
    """The picture at `path`, made smaller where it is larger than a page shows.

    ValueError, in one line, where it is damaged, or has more pixels than `refuse_bomb` allows.
    """
    with refusing(path, "is not shown"), open_regular(path) as file:
        image = open_image(file)
        refuse_bomb(image, os.fstat(file.fileno()).st_size)
        image.thumbnail((PAGE_PIXELS, PAGE_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
