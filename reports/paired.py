"""The numbers of an evaluation of pairs, for the console and the page."""

from collections.abc import Callable, Mapping
from typing import Any

# of one draw, of the mean of the draws, of the condition itself: suffixes of entries
OF = {"": "one draw", "_mean": "mean of the draws", "_condition": "the condition itself"}
MEASURES = {"pairs_psnr": "PSNR of {}, dB", "pairs_ssim": "SSIM of {}"}
COVERAGES = ("pairs_coverage", "pairs_coverage_inner")


def scalars(report: Mapping) -> list[str]:
    """Names of the entries of a report on pairs that are numbers."""
    return [key for key in report if key.startswith("pairs_") and key != "pairs_ranks"]


def rows(report: Mapping, text: Callable[[float], str]) -> list[tuple[str, str]]:
    """(label, value) of each number, with its standard error over images; [] without pairs."""
    if "pairs_images" not in report:
        return []

    def value(key: str) -> str:
        error = report.get(f"{key}_error")
        return text(report[key]) + (f" ± {text(error)}" if error is not None else "")

    lines = [
        (label.format(of), value(key + suffix))
        for key, label in MEASURES.items()
        for suffix, of in OF.items()
        if key + suffix in report
    ]
    if "pairs_spread" in report:
        lines.append(("spread of the draws, of [0, 1]", text(report["pairs_spread"])))
    for key in COVERAGES:
        if key in report:
            i, j = ranks_of(key, report)
            expected = text(report[f"{key}_expected"])
            label = f"coverage between draws {i} and {j} in order"
            lines.append((label, f"{value(key)}, expected {expected}"))
    return lines


def ranks_of(key: str, report: Mapping[str, Any]) -> tuple[int, int]:
    """The ranks i and j, of the K draws in order, of a coverage."""
    draws = int(report["pairs_draws"])
    i = round((draws + 1) * (1 - float(report[f"{key}_expected"])) / 2)
    return i, draws + 1 - i
