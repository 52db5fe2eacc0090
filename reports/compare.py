"""Runs side by side, on one page that needs no network.

    python3 -m reports.compare WORKDIR ... --out HTML [--eval_folder eval]

It shows the settings that differ, the losses over each other, the metrics of the last evaluated
checkpoint of each with the best in bold, and samples. Runs of which only the seed differs are one
row: their mean, and their range in brackets.
"""

import argparse
import json
import math
import os.path
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metrics.table import METRICS, Metric, remarks
from reports.evaluation_page import page_png, read_report
from reports.page import Picture, Report, document, figure, html_table, picture_html, section
from reports.plots import COLOURS, Points, number, several
from storage import run_config
from storage.files import atomic_write
from storage.tensorboard import read_scalars


class Run(NamedTuple):
    """What a page needs of a run; an empty report or no picture where there is none yet."""

    name: str
    config: dict[str, Any]
    curves: Mapping[str, Points]
    report: Report
    picture: bytes | None


def read_run(workdir: Path, name: str, eval_folder: str) -> Run:
    """The run in `workdir`, to be called `name`.

    Its report is that of the last checkpoint evaluated in `eval_folder`, its picture the samples
    of that, else of training's last snapshot. Raises ValueError where nothing there carries a
    config, or a file is damaged.
    """
    config, folder = run_config.flatten(run_config.load(workdir)), workdir / eval_folder
    numbers = [path.stem.removeprefix("report_") for path in folder.glob("report_*.npz")]
    k = max((int(n) for n in numbers if n.isdecimal()), default=None)
    report = {} if k is None else read_report(folder / f"report_{k}.npz")
    snapshots = {int(p.name[5:]): p for p in workdir.glob("samples/iter_*") if p.name[5:].isdigit()}
    pictures = [folder / f"ode_images_{k}.png"]
    pictures += [snapshots[max(snapshots)] / "sample.png"] if snapshots else []
    picture = next((page_png(path) for path in pictures if path.exists()), None)
    return Run(name, config, read_scalars(workdir / "tensorboard"), report, picture)


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of which nothing but the seed differs, together, in the order of their first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.config | {"seed": None}, sort_keys=True), []).append(run)
    return list(groups.values())


def differing(groups: Sequence[Sequence[Run]]) -> dict[str, list[str]]:
    """{key: the value in each group}, as text, of the settings in which the groups differ."""
    configs = [group[0].config for group in groups]
    values = {key: [str(config.get(key)) for config in configs] for key in configs[0]}
    return {key: v for key, v in values.items() if len(set(v)) > 1 and key != "seed"}


def compare_page(runs: Sequence[Run]) -> str:
    """The page, HTML, of one or more runs. Whatever comes from outside is escaped."""
    groups = grouped(runs)
    differ = differing(groups)
    losses = []
    for tag, title in (("loss/train", "Training loss"), ("loss/test", "Held-out loss")):
        curves = [(k, run.curves.get(tag, ())) for k, group in enumerate(groups) for run in group]
        if plot := several(curves, ("step", "loss")):
            losses.append(figure(plot, title, "Over steps; of many steps means of neighbours."))
    shown = [_samples(group) for group in groups if any(run.picture is not None for run in group)]
    key = "".join(f"<span>{_key(k)}{_names(group)}</span>" for k, group in enumerate(groups))
    title = f"{len(runs)} run{'s' * (len(runs) > 1)} side by side"
    body = [
        f"<header><h1>{title}</h1><div class=legend>{key}</div></header>",
        section("Settings that differ", _settings(groups, differ)),
        section("Metrics", _metrics(groups, differ)),
        section("Losses", f"<div class=figures>{''.join(losses)}</div>" if losses else ""),
        section("Samples", f"<div class=strips>{''.join(shown)}</div>" if shown else ""),
    ]
    return document(title, "".join(body))


def _samples(group: Sequence[Run]) -> str:
    """The samples of the first run of the group that has any."""
    run = next(run for run in group if run.picture is not None)
    caption = f"Seed {run.config['seed']}, none chosen."
    return picture_html(Picture(run.name, caption, run.picture))


def _key(k: int) -> str:
    return f'<i class="key c{k % COLOURS}"></i>'


def _names(group: Sequence[Run]) -> str:
    return escape(", ".join(run.name for run in group))


def _settings(groups: Sequence[Sequence[Run]], differ: Mapping[str, list[str]]) -> str:
    if not differ:
        return "<p class=note>None but the seed.</p>"
    rows = [_row(key, ([value] for value in values)) for key, values in differ.items()]
    return f"<div class='wide lines'>{html_table(['', *map(_short, groups)], rows)}</div>"


def _metrics(groups: Sequence[Sequence[Run]], differ: Mapping[str, list[str]]) -> str:
    """A row for each metric that any run has, a column for each group."""
    reports = [[run.report for run in group if run.report] for group in groups]
    spaces = {str(report.get("features", "")) for some in reports for report in some} - {""}
    space = spaces.pop() if len(spaces) == 1 else ""
    rows = [_row("step", ([number(r["step"]) for r in some] for some in reports))]
    for key, metric in METRICS.items():
        values = [[float(r[key]) for r in some if key in r] for some in reports]
        if metric.better and any(values):
            # losses of different methods are not of one kind
            best = None if key == "loss" and "training.sde" in differ else _best(metric, values)
            label = f"{metric.label_in(space)} {'↓' if metric.better < 0 else '↑'}"
            rows.append(_row(label, map(_over_seeds, values), best))
    if not any(reports):
        return "<p class=note>No run is evaluated yet.</p>"
    notes = "".join(
        f"<p class=note>{escape(run.name)}: {escape(remark)}.</p>"
        for group in groups
        for run in group
        for remark in remarks(run.report)
    )
    return f"<div class='wide lines'>{html_table(['', *map(_short, groups)], rows)}</div>{notes}"


def _row(label: str, cells: Iterable[Sequence[str]], best: int | None = None) -> str:
    """A row of a table; a cell's several texts are joined where they differ."""
    texts = (", ".join(dict.fromkeys(texts)) for texts in cells)
    marked = (
        f"<td{' class=best' if k == best else ''}>{escape(text)}</td>"
        for k, text in enumerate(texts)
    )
    return f"<tr><td>{escape(label)}</td>{''.join(marked)}</tr>"


def _short(group: Sequence[Run]) -> str:
    return group[0].name + (f" ({len(group)} seeds)" if len(group) > 1 else "")


def _over_seeds(values: Sequence[float]) -> list[str]:
    """The mean and, of several, the range; nothing of none."""
    if len(values) < 2:
        return [*map(number, values)]
    return [f"{number(np.mean(values))}\n({number(min(values))} to {number(max(values))})"]


def _best(metric: Metric, values: Sequence[Sequence[float]]) -> int | None:
    """The group with the best mean, if several have a finite one."""
    means = {k: metric.better * np.mean(v) for k, v in enumerate(values) if v}
    means = {k: mean for k, mean in means.items() if math.isfinite(mean)}
    return max(means, key=means.get) if len(means) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the page, HTML")
    parser.add_argument("--eval_folder", default="eval", help="of each workdir")
    options = parser.parse_args()
    try:
        # each is called by its path from the folder that holds them all
        folder = os.path.commonpath([path.resolve().parent for path in options.workdirs])
        names = [os.path.relpath(path.resolve(), folder) for path in options.workdirs]
        runs = [
            read_run(path, name, options.eval_folder)
            for path, name in zip(options.workdirs, names, strict=True)
        ]
        page = compare_page(runs)
        with atomic_write(options.out) as file:
            file.write(page.encode())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"page: {options.out}")


if __name__ == "__main__":
    main()
