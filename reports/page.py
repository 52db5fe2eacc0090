"""An evaluation on one HTML page: numbers, curves, pictures, downloads, settings.

Data in, text out. Whatever comes from outside is escaped.
"""

import base64
import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from metrics.table import METRICS, Entry, entries
from metrics.table import remarks as remarks_of
from reports.plots import (
    CSS,
    SMALL,
    Points,
    curve_colour,
    drawable,
    histogram,
    loss_plot,
    number,
    several,
)
from reports.settings import OF_CHECKPOINT, Settings, differing, obstacle, of_report

Report = Mapping[str, float | str | NDArray]


@dataclass(frozen=True)
class Picture:
    """A picture of the page, in an image format called `kind`, with the words below it."""

    title: str
    caption: str
    content: bytes
    kind: str = "png"


def render(
    title: str,
    facts: Mapping[str, str],
    reports: Mapping[int, Report],
    shown: int,
    curves: Mapping[str, Points],
    pictures: Sequence[Picture],
    values: Mapping,
    by_evaluations: Mapping[str, Points],
    files: Mapping[str, Sequence[str]],
) -> str:
    """The whole page, under the heading `title`.

    `facts` describe what was evaluated. `reports` are {k: arrays of report_{k}.npz}, by rising k;
    figures, large numbers and `pictures` are of checkpoint `shown`. `curves` are {name: [(step,
    loss)]} of training, and `values` has every setting, in nested mappings. `by_evaluations` are
    {sampler: [(evaluations of a sample, Frechet distance)]}, and `files` {name: paths relative to
    the page's folder}.
    """
    report = reports[shown]
    figures = [picture_html(p) for p in pictures]
    figures += _distances(by_evaluations, report)
    if loss := loss_plot(curves):
        caption = "Training loss: mean and range of neighbouring steps; held-out loss as dots."
        figures.append(figure(loss, "Loss", caption))
    bits = np.asarray(report.get("bpd_images", ()))
    bits = bits[drawable(bits)]
    if len(bits):
        caption = f"Bits per dimension of {len(bits):,} images; the line is their mean."
        plot = histogram(bits, ("bits/dim", "images"))
        figures.append(figure(plot, "Likelihood", caption))
    figures = [f.replace("<b>", f"<b>Figure {i}. ", 1) for i, f in enumerate(figures, 1)]
    pair, rest = "".join(figures[:2]), "".join(figures[2:])
    shown_figures = f"<div class=pair>{pair}</div><div class=figures>{rest}</div>"
    body = [
        f"<header><h1>{escape(title)}</h1><dl class=facts>{_pairs(facts)}</dl></header>",
        _cards(report),
        section("Checkpoints", _table(reports, shown) + _trends(reports, shown)),
        section("Figures", shown_figures if figures else ""),
        section("Cost", _cost(report)),
        section("Downloads", _downloads(reports, files)),
        section("Settings", _settings(values)),
    ]
    return document(title, "".join(body))


def document(title: str, body: str) -> str:
    """A page that needs no other file: `body` is HTML, the `title` is escaped."""
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{CSS}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def _pairs(pairs: Mapping) -> str:
    return "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>"
        for key, value in pairs.items()
    )


def html_table(names: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def _compared(reports: Mapping[int, Report]) -> list[Entry]:
    """Metrics by which checkpoints are compared: those with a direction that any of them has."""
    return [entry for entry in entries(*reports.values()) if entry.metric.better]


def _cards(report: Report) -> str:
    cards = []
    for key, metric, *_, label in entries(report):
        error, of_data = (report.get(f"{key}_{what}") for what in ("error", "data"))
        spread = "" if error is None else f"<small> ± {float(error):.2g}</small>"
        note = metric.note
        if of_data is not None:
            note += f"{'; data against data' if metric.halves else ''}: {number(of_data)}"
        cards.append(
            f"<div class=card><h3>{escape(label)}</h3>"
            f"<p>{number(report[key])}{spread}</p><span>{escape(note)}</span></div>"
        )
    remarks = "".join(f"<p class=warning>{escape(each)}.</p>" for each in remarks_of(report))
    if "half_first" in report:
        remarks += (
            "<p class=note>Data against data is the floor, dashed in curves: what samples "
            f"without fault have. {number(report['half_first'])} training images take the place of "
            f"samples, and {number(report['half_other'])} others that of the data. More images "
            "have smaller Fréchet distances, as their moments are more exact.</p>"
        )
    if report.get("nonfinite", 0) > 0:
        drawn = float(report["num_samples"]) + float(report["nonfinite"])
        remarks += (
            f"<p class=warning>{number(report['nonfinite'])} of {number(drawn)} samples were not "
            "finite; they are in no number of this page.</p>"
        )
    return f"<div class=cards>{''.join(cards)}</div>{remarks}"


def _table(reports: Mapping[int, Report], shown: int) -> str:
    """Table of checkpoints, the best of several in bold, with a last row for the data themselves.

    Settings in which evaluations differ are columns. Where they forbid ranking the values of a
    metric, none is in bold, and a line says why.
    """
    compared = _compared(reports)
    differ, metrics = _differing(reports), [entry.key for entry in compared]
    best = {entry.key: _best(reports, entry) for entry in compared}
    names = [f"{e.label}\u00a0{'↓' if e.metric.better < 0 else '↑'}" for e in compared]
    rows = []
    for i, (k, report) in enumerate(reports.items()):
        mark = " class=shown" if k == shown and len(reports) > 1 else ""
        cells = [f"<td>{k}</td>"]
        for key in ("step", "num_samples", *metrics):
            value = number(report[key]) if key in report else ""
            cells.append(f"<td{' class=best' if best.get(key) == k else ''}>{value}</td>")
        cells += [f"<td>{escape(texts[i])}</td>" for texts in differ.values()]
        rows.append(f"<tr{mark}>{''.join(cells)}</tr>")
    if any(f"{key}_data" in reports[shown] for key in metrics):
        values = (reports[shown].get(f"{key}_data") for key in metrics)
        cells = "".join(f"<td>{'' if value is None else number(value)}</td>" for value in values)
        rows.append(
            f"<tr class=data><td>data against data</td><td></td><td></td>{cells}"
            f"{'<td></td>' * len(differ)}</tr>"
        )
    table = html_table(("checkpoint", "step", "samples", *names, *differ), rows)
    return f"<div class=wide>{table}</div>{_remarks(reports, shown, differ)}"


def _remarks(reports: Mapping[int, Report], shown: int, differ: Mapping) -> str:
    """Lines on settings in which evaluations differ, and on metrics without a best."""
    obstacles, lines = {}, []
    if differ:
        lines.append(
            f"These checkpoints were not evaluated alike ({', '.join(differ)}): curves are of "
            f"those evaluated as checkpoint {shown}."
        )
    for entry in _compared(reports):
        having = [report for report in reports.values() if entry.key in report]
        if len(having) > 1 and (reason := obstacle(entry.key, having)):
            obstacles.setdefault(reason, []).append(entry.name)
    lines += not_ranked(obstacles)
    return notes(lines)


def not_ranked(obstacles: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines that say why values are not ranked, from {reason: labels of metrics}."""
    return [f"No best {', '.join(labels)}: {reason}." for reason, labels in obstacles.items()]


def notes(lines: Sequence[str]) -> str:
    return "".join(f"<p class=note>{escape(line)}</p>" for line in lines)


def _differing(reports: Mapping[int, Report]) -> dict[str, list[str]]:
    """{setting: its text in each of several `reports`}, for settings that differ."""
    return differing([_of_checkpoint(r) for r in reports.values()]) if len(reports) > 1 else {}


def _of_checkpoint(report: Report) -> Settings:
    """Settings of an evaluation without those that always differ between checkpoints."""
    return of_report(report).without(*OF_CHECKPOINT)


def _best(reports: Mapping[int, Report], entry: Entry) -> int | None:
    """The checkpoint with the best value; None where there is only one, or no ranking."""
    values = {k: float(r[entry.key]) for k, r in reports.items() if entry.key in r}
    if obstacle(entry.key, [reports[k] for k in values]):
        return None
    values = {k: entry.metric.better * v for k, v in values.items() if math.isfinite(v)}
    return max(values, key=values.get) if len(values) > 1 else None


def _trends(reports: Mapping[int, Report], shown: int) -> str:
    """Small curves of the metrics over the checkpoints evaluated with the settings of `shown`."""
    made_by, plots = _of_checkpoint(reports[shown]), []
    reports = {k: r for k, r in reports.items() if not differing([made_by, _of_checkpoint(r)])}
    for key, metric, _, name, label in _compared(reports):
        having = [r for r in reports.values() if key in r]
        points = [(float(r["step"]), float(r[key])) for r in having if drawable(r[key])]
        if len(points) > 1:
            floor = having[-1].get(f"{key}_data")
            arrow = "lower is better" if metric.better < 0 else "higher is better"
            plot = several([(0, points)], ("step", name), size=SMALL, floor=floor)
            plots.append(f"<div><h3>{escape(label)} <small>{arrow}</small></h3>{plot}</div>")
    return f"<div class=trends>{''.join(plots)}</div>" if plots else ""


def _distances(curves: Mapping[str, Points], report: Report) -> list[str]:
    """The figure of the distance against the evaluations of a sample, if there are several."""
    if len({evaluations for points in curves.values() for evaluations, _ in points}) < 2:
        return []
    labels = {entry.key: entry.label for entry in entries(report)}
    name = "evaluations of the network for a sample"
    label = labels.get("fid", METRICS["fid"].label)
    plot = several(
        list(enumerate(curves.values())),
        (name, label),
        floor=report.get("fid_data"),
        logarithmic_x=True,
    )
    caption = (
        "The evaluations of this checkpoint in all folders of the run, with as many samples, "
        "compared with the same data. Dashed: data against data."
    )
    return [figure(plot + legend(curves), f"{label} against evaluations", caption)]


def _downloads(reports: Mapping[int, Report], files: Mapping[str, Sequence[str]]) -> str:
    """Links: the numbers of all checkpoints within the page, and `files` beside it."""
    numbers = {
        k: {n: v for n, v in r.items() if np.ndim(v) == 0 and np.asarray(v).dtype.kind in "iuf"}
        for k, r in reports.items()
    }
    for name, texts in _differing(reports).items():
        for row, text in zip(numbers.values(), texts, strict=True):
            row[name] = text
    names = ["checkpoint", *dict.fromkeys(name for row in numbers.values() for name in row)]
    table = io.StringIO()
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows({"checkpoint": k, **row} for k, row in numbers.items())
    content = base64.b64encode(table.getvalue().encode()).decode("ascii")
    link = f'<a download="metrics.csv" href="data:text/csv;base64,{content}">metrics.csv</a>'
    rows = [f"<div><dt>numbers of all checkpoints</dt><dd>{link}</dd></div>"]
    for what, paths in files.items():
        links = " ".join(f'<a href="{quote(path)}">{escape(path)}</a>' for path in paths)
        rows.append(f"<div><dt>{escape(what)}, beside this page</dt><dd>{links}</dd></div>")
    return f"<dl class=files>{''.join(rows)}</dl>"


def _cost(report: Report) -> str:
    """Images, evaluations of the network and seconds of what was drawn and measured."""
    rows = {}
    if "num_samples" in report:
        drawn = report["num_samples"] + report["nonfinite"]
        rows["samples"] = (drawn, report.get("nfe", math.nan), report["sampling_seconds"])
    if "bpd_images" in report:
        images = len(report["bpd_images"])
        rows["likelihoods"] = (images, report["bpd_nfe"], report["bpd_seconds"])
    lines = []
    for what, values in rows.items():
        cells = "".join(f"<td>{number(round(float(v), 1))}</td>" for v in values)
        lines.append(f"<tr><td>{what}</td>{cells}</tr>")
    names = ("", "images", "network evaluations", "seconds")
    table = html_table(names, lines) if rows else ""
    seconds = number(round(float(report["seconds"]), 1))
    return (
        f"<div class=wide>{table}</div><p class=note>{seconds} seconds for this checkpoint since "
        "the last start; what an earlier one left on disk is not in them.</p>"
    )


def _settings(values: Mapping) -> str:
    """One folded list for each section of the config, and one for what is in none."""
    sections = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    alone = {name: value for name, value in values.items() if name not in sections}
    lists = []
    for name, values in {"general": alone, **sections}.items():
        pairs = f"<dl class=pairs>{_pairs(dict(sorted(values.items())))}</dl>"
        lists.append(f"<details><summary>{escape(name)}</summary>{pairs}</details>")
    return "".join(lists)


def picture_html(picture: Picture) -> str:
    """A figure that holds the picture itself."""
    data = base64.b64encode(picture.content).decode("ascii")
    source = f"data:image/{picture.kind};base64,{data}"
    image = f'<img alt="{escape(picture.title)}" src="{source}">'
    return figure(image, picture.title, picture.caption)


def legend(names: Iterable[str]) -> str:
    """The colours of curves, from that of number 0 on, with their `names`."""
    keys = (
        f'<span><i class=key style="background:var(--{curve_colour(k)})"></i>{escape(name)}</span>'
        for k, name in enumerate(names)
    )
    return f"<div class=legend>{''.join(keys)}</div>"


def figure(content: str, title: str, caption: str) -> str:
    words = f"<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption>"
    return f"<figure>{content}{words}</figure>"
