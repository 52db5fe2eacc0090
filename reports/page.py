"""An evaluation on one HTML page: numbers, curves, pictures, downloads, settings.

Data in, text out.
"""

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from metrics.table import METRICS, Entry, entries, interval_of, range_of, remark_on, remarks
from reports import paired
from reports.html import Picture, document, figure, legend, notes, pairs, row, section, table
from reports.plots import SMALL, Points, curve_plot, drawable, histogram, number
from reports.settings import OF_CHECKPOINT, Settings, differing, obstacle, of_report
from reports.table import RESTORED, likelihood_of

PAIRED = (
    "The PSNR of one draw is up to 3 dB below that of the mean of many, which is smoother than any "
    "image. Coverage: how often the true value of a pixel lies between two of its sorted draws; "
    "draws from the true posterior have the expected share."
)

Report = Mapping[str, float | str | NDArray]

INTERVALS = (
    "95 %: the range of 95 % of the values that other draws of as many samples of this network "
    "would have, compared with the same data (docs/metrics.md)."
)
SHARP_COSTS = (
    "A restoration is one of many images that fit what was measured. Its mean squared error is "
    "twice that of the mean of them all, which costs 3 dB; a blurred image, as that mean is, can "
    "therefore have the higher PSNR. The mean of a few restorations comes near that of all (Blau "
    "and Michaeli, 2018)."
)


def render(
    title: str,
    reports: Mapping[int, Report],
    current: int,
    *,
    facts: Mapping[str, str] = {},
    losses: Mapping[str, Points] = {},
    pictures: Sequence[Picture] = (),
    settings: Mapping = {},
    distances: Mapping[str, Points] = {},
    files: Mapping[str, Sequence[str]] = {},
) -> str:
    """The whole page, under the heading `title`.

    Args:
        reports: the arrays of report_{k}.npz by checkpoint k, rising.
        current: the checkpoint whose numbers are large, and of which figures and `pictures` are.
        facts: descriptions of what was evaluated, by name.
        losses: points (step, loss) of training, under "train" and "test", and those of each phase
            of the objective's schedule under its name.
        settings: all keys of the config, in nested mappings.
        distances: points (evaluations of a sample, Frechet distance), by sampler.
        files: paths relative to the page's folder, by their common name.
    """
    report = reports[current]
    figures = [picture.html() for picture in pictures]
    figures += [*_distances(distances, report), *_losses(losses), *_likelihoods(report)]
    figures = [f.replace("<b>", f"<b>Figure {i}. ", 1) for i, f in enumerate(figures, 1)]
    pair, rest = "".join(figures[:2]), "".join(figures[2:])
    content = [
        f"<header><h1>{escape(title)}</h1>{pairs(facts, 'facts')}</header>",
        _cards(report),
        section("Restoration", _restoration(report)),
        section("Pairs", _pairs(report)),
        section("Checkpoints", _checkpoints(reports, current) + _trends(reports, current)),
        section(
            "Figures",
            f"<div class=pair>{pair}</div><div class=figures>{rest}</div>" * bool(figures),
        ),
        section("Cost", _cost(report)),
        section("Downloads", _downloads(reports, files)),
        section("Settings", _settings(settings)),
    ]
    return document(title, "".join(content))


def _cards(report: Report) -> str:
    """The numbers of a report in large type, and remarks on them."""
    cards = []
    for key, metric, *_, label in entries(report):
        error, of_data = report.get(f"{key}_error"), report.get(f"{key}_data")
        remark = remark_on(report, key)
        spread = "" if error is None else f"<small> ± {float(error):.2g}</small>"
        note = metric.note
        if of_data is not None:
            note += f"{'; data against data' if metric.halves else ''}: {number(of_data)}"
        interval = ""
        if ends := interval_of(report, key):
            interval = f"<span>95 %: {number(ends[0])} to {number(ends[1])}</span>"
        if ends := range_of(report, key):
            words = f"mean of {number(report['repeats'])} sets: minimum {number(ends[0])}"
            interval = f"<span>{words}, maximum {number(ends[1])}</span>"
        doubt = f"<span class=doubt>{escape(remark)}.</span>" if remark else ""
        cards.append(
            f"<div class='card{' doubted' * bool(remark)}'><h3>{escape(label)}</h3>"
            f"<p>{number(report[key])}{spread}</p>{interval}<span>{escape(note)}</span>{doubt}</div>"
        )
    content = f"<div class=cards>{''.join(cards)}</div>"
    content += notes((f"{remark}." for remark in remarks(report, apart=True)), "warning")
    if "half_first" in report:
        line = (
            "Data against data is the floor, dashed in curves: what samples without fault have. "
            f"{number(report['half_first'])} training images take the place of samples, and "
            f"{number(report['half_other'])} others that of the data. More images have smaller "
            "Fréchet distances, as their moments are more exact."
        )
        content += notes([line])
    if any(interval_of(report, entry.key) for entry in entries(report)):
        content += notes([INTERVALS])
    if report.get("nonfinite", 0) > 0:
        samples = float(report["num_samples"]) + float(report["nonfinite"])
        line = (
            f"{number(report['nonfinite'])} of {number(samples)} samples were not finite; they are "
            "in no number of this page."
        )
        content += notes([line], "warning")
    return content


def _restoration(report: Report) -> str:
    """Table of the restorations' PSNR, spread and cost; "" without restorations."""
    if "restore_images" not in report:
        return ""
    values = {"images": report["restore_images"]}
    values |= {label: report[key] for key, label in RESTORED.items() if key in report}
    lines = [SHARP_COSTS] * ("restore_psnr" in report)
    return table(list(values), [row(map(number, values.values()))]) + notes(lines)


def _pairs(report: Report) -> str:
    """Table of draws for held-out conditions; "" without them."""
    if not (lines := paired.rows(report, number)):
        return ""
    of = f"{number(report['pairs_images'])} pairs, {number(report['pairs_draws'])} draws of each"
    remarks = [f"{of}; ± is the standard error over the pairs. {PAIRED}"]
    if diverged := report.get("pairs_nonfinite"):
        remarks.append(
            f"{number(diverged)} further pairs with draws that are not finite do not count."
        )
    return table(("", "value"), [*map(row, lines)]) + notes(remarks)


def _compared(reports: Mapping[int, Report]) -> list[Entry]:
    """Metrics by which checkpoints are compared: those with a direction that any of them has."""
    return [entry for entry in entries(*reports.values()) if entry.metric.better]


def _checkpoints(reports: Mapping[int, Report], current: int) -> str:
    """Table of checkpoints, the best of several in bold, with a last row for the data themselves.

    A single checkpoint without metrics has none.

    Settings in which evaluations differ are columns. Where they forbid ranking the values of a
    metric, none is in bold, and a line says why.
    """
    metrics, differ = _compared(reports), _differing(reports)
    if not metrics and len(reports) == 1:
        return ""
    best, obstacles, lines = {}, {}, []
    for entry in metrics:
        values = {k: float(r[entry.key]) for k, r in reports.items() if entry.key in r}
        reason = reason_not_to_rank(entry.key, [reports[k] for k in values])
        if reason and len(values) > 1:
            obstacles.setdefault(reason, []).append(entry.name)
        best[entry.key] = [] if reason else best_of(values, entry.metric.better)[:1]
    keys = ["step", "num_samples", *best]
    rows = []
    for i, (k, report) in enumerate(reports.items()):
        cells = [str(k), *(number(report[key]) if key in report else "" for key in keys)]
        marked = [column for column, key in enumerate(keys, 1) if k in best.get(key, ())]
        kind = "shown" if k == current and len(reports) > 1 else ""
        rows.append(row([*cells, *(texts[i] for texts in differ.values())], marked, kind))
    of_data = [reports[current].get(f"{key}_data") for key in best]
    if any(value is not None for value in of_data):
        cells = ["" if value is None else number(value) for value in of_data]
        cells = ["data against data", "", "", *cells, *[""] * len(differ)]
        rows.append(row(cells, kind="data"))
    if differ:
        lines.append(
            f"These checkpoints were not evaluated alike ({', '.join(differ)}): curves are of "
            f"those evaluated as checkpoint {current}."
        )
    names = [f"{e.label}\u00a0{'↓' if e.metric.better < 0 else '↑'}" for e in metrics]
    names = ["checkpoint", "step", "samples", *names, *differ]
    return table(names, rows) + notes([*lines, *not_ranked(obstacles)])


def best_of(values: Mapping[int, float], better: int) -> list[int]:
    """The keys of the best of several finite `values`; `better` as in `Metric`."""
    values = {k: better * value for k, value in values.items() if math.isfinite(value)}
    best = [k for k, value in values.items() if value == max(values.values())]
    return best if len(values) > 1 else []


def reason_not_to_rank(key: str, reports: Sequence[Report]) -> str:
    """Why no value under `key` is the best of `reports`, which have it; "" where one may be."""
    remarks = (remark_on(report, key) for report in reports)
    return obstacle(key, reports) or next(filter(None, remarks), "")


def not_ranked(obstacles: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines that say why values are not ranked, from {reason: labels of metrics}."""
    return [f"No best {', '.join(labels)}: {reason}." for reason, labels in obstacles.items()]


def _of_checkpoint(report: Report) -> Settings:
    """Settings of an evaluation without those that always differ between checkpoints."""
    return of_report(report).without(*OF_CHECKPOINT)


def _differing(reports: Mapping[int, Report]) -> dict[str, list[str]]:
    """{setting: its text in each of several `reports`}, for settings that differ."""
    return differing([_of_checkpoint(r) for r in reports.values()]) if len(reports) > 1 else {}


def _trends(reports: Mapping[int, Report], current: int) -> str:
    """Small curves of the metrics over the checkpoints evaluated with the settings of `current`."""
    made_by, plots = _of_checkpoint(reports[current]), []
    alike = {k: r for k, r in reports.items() if not differing([made_by, _of_checkpoint(r)])}
    for key, metric, _, name, label in _compared(alike):
        having = [r for r in alike.values() if key in r]
        points = [(float(r["step"]), float(r[key])) for r in having if drawable(r[key])]
        if len(points) > 1:
            floor = having[-1].get(f"{key}_data")
            arrow = "lower is better" if metric.better < 0 else "higher is better"
            plot = curve_plot([(0, points)], ("step", name), size=SMALL, floor=floor)
            plots.append(f"<div><h3>{escape(label)} <small>{arrow}</small></h3>{plot}</div>")
    return f"<div class=trends>{''.join(plots)}</div>" if plots else ""


def _distances(curves: Mapping[str, Points], report: Report) -> list[str]:
    """The figure of the distance against the evaluations of a sample, if there are several."""
    if len({evaluations for points in curves.values() for evaluations, _ in points}) < 2:
        return []
    labels = {entry.key: entry.label for entry in entries(report)}
    label = labels.get("fid", METRICS["fid"].label)
    plot = curve_plot(
        list(enumerate(curves.values())),
        ("evaluations of the network for a sample", label),
        floor=report.get("fid_data"),
        logarithmic_x=True,
    )
    caption = (
        "The evaluations of this checkpoint in all folders of the run, with as many samples, "
        "compared with the same data. Dashed: data against data."
    )
    return [figure(plot + legend(curves), f"{label} against evaluations", caption)]


def _losses(curves: Mapping[str, Points]) -> list[str]:
    phases = {k.replace("_", " "): curves[k] for k in curves if k not in ("train", "test")}
    training = list(enumerate(phases.values())) or [(0, curves.get("train", ()))]
    plot = curve_plot(training, ("step", "loss"), with_range=True, dots=curves.get("test", ()))
    caption = "Training loss: mean and range of neighbouring steps; held-out loss as dots."
    return [figure(plot + legend(phases), "Loss", caption)] if plot else []


def _likelihoods(report: Report) -> list[str]:
    unit = likelihood_of(report)
    values = np.asarray(report.get(f"{unit}_images", ()))
    values = values[drawable(values)]
    if not len(values):
        return []
    words, name = {
        "bpd": ("Bits per dimension", "bits/dim"),
        "nats": ("Negative log-likelihoods, in nats per entry,", "nats per entry"),
    }[unit]
    caption = f"{words} of {len(values):,} images; the line is their mean."
    return [figure(histogram(values, (name, "images")), "Likelihood", caption)]


def _cost(report: Report) -> str:
    """Images, evaluations of the network and seconds of what was drawn and measured."""
    costs = {}
    if "num_samples" in report:
        samples = report["num_samples"] + report["nonfinite"]
        costs["samples"] = samples, report.get("nfe", math.nan), report["sampling_seconds"]
    if f"{(unit := likelihood_of(report))}_images" in report:
        images = len(report[f"{unit}_images"])
        costs["likelihoods"] = images, report[f"{unit}_nfe"], report[f"{unit}_seconds"]

    if "restore_images" in report:
        images = report["restore_images"]
        costs["images restored"] = images, report["restore_nfe"], report["restore_seconds"]

    if "pairs_images" in report:
        images = report["pairs_images"] * report["pairs_draws"]
        costs["draws of pairs"] = images, report["pairs_nfe"], report["pairs_seconds"]

    def text(value: float) -> str:
        return number(round(float(value), 1))

    rows = [row([name, *map(text, values)]) for name, values in costs.items()]
    line = (
        f"{text(report['seconds'])} seconds for this checkpoint since the last start; what an "
        "earlier one left on disk is not in them."
    )
    names = ("", "images", "network evaluations", "seconds")
    return (table(names, rows) if rows else "") + notes([line])


def _downloads(reports: Mapping[int, Report], files: Mapping[str, Sequence[str]]) -> str:
    """Links: the numbers of all checkpoints within the page, and `files` beside it."""
    differ, rows = _differing(reports), []
    for i, (k, report) in enumerate(reports.items()):
        arrays = {name: np.asarray(value) for name, value in report.items()}
        numbers = {n: a for n, a in arrays.items() if a.ndim == 0 and a.dtype.kind in "iuf"}
        settings = {name: texts[i] for name, texts in differ.items()}
        rows.append({"checkpoint": k} | numbers | settings)
    content = io.StringIO()
    writer = csv.DictWriter(content, list(dict.fromkeys(name for each in rows for name in each)))
    writer.writeheader()
    writer.writerows(rows)
    encoded = base64.b64encode(content.getvalue().encode(errors="backslashreplace")).decode("ascii")
    link = f'<a download="metrics.csv" href="data:text/csv;base64,{encoded}">metrics.csv</a>'
    items = [f"<div><dt>numbers of all checkpoints</dt><dd>{link}</dd></div>"]
    for name, paths in files.items():
        links = " ".join(f'<a href="{quote(path)}">{escape(path)}</a>' for path in paths)
        items.append(f"<div><dt>{escape(name)}, beside this page</dt><dd>{links}</dd></div>")
    return f"<dl class=files>{''.join(items)}</dl>"


def _settings(values: Mapping) -> str:
    """One folded list for each section of the config, and one for what is in none."""
    sections = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    general = {name: value for name, value in values.items() if name not in sections}
    lists = (
        f"<details><summary>{escape(name)}</summary>{pairs(dict(sorted(keys.items())), 'pairs')}"
        "</details>"
        for name, keys in {"general": general, **sections}.items()
    )
    return "".join(lists)
