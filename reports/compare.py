"""Runs side by side, on one page that needs no network.

    python3 -m reports.compare WORKDIR ... --out HTML [--eval_folder eval]

It shows the settings that differ, the losses over each other, the metrics of the last evaluated
checkpoint of each with the best in bold, and samples. Settings are those of the run's config and
those that its evaluation was computed with. Runs that differ in the seed only are one column: their
mean, and their range in brackets; runs of one seed, or of the same weights, count once. Values are
ranked only where the number of samples, the feature space and the data are equal; losses only where
the method and its settings are.
"""

import argparse
import json
import math
import os.path
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from configs.keys import of_part
from losses import OBJECTIVES, own_keys
from metrics.table import Metric, entries
from metrics.table import remarks as remarks_of
from reports import settings
from reports.evaluation_page import page_png, read_report
from reports.page import (
    Picture,
    Report,
    document,
    figure,
    html_table,
    legend,
    not_ranked,
    notes,
    picture_html,
    section,
)
from reports.plots import Points, number, several
from reports.settings import Settings, obstacle, of_report
from sources import SOURCES
from sources.codec import CODECS
from storage import run_config
from storage.files import atomic_write
from storage.tensorboard import read_scalars

# Settings, or prefixes of their names, that decide whether losses can be compared.
OF_LOSS = (
    *("data.dataset", "data.image_size", "data.num_channels", "data.num_classes"),
    *("data.conditions", "data.codec", "data.random_flip", "data.uniform_dequantization"),
    *("training.objective", "training.sde", "training.batch_size", "training.reduce_mean"),
    *("training.target", "training.likelihood_weighting", "training.continuous"),
    *("training.gamma", "training.tau", "training.M", "training.restrict_M", "model.D"),
    *("model.sigma_", "model.beta_", "model.P_"),
)
OF_EVALUATIONS = ("sampling.", "eval.")  # settings of a run that an evaluation may change
THE_RUNS = "the run's"  # the seed of an evaluation that uses its run's seed


@dataclass(frozen=True, eq=False)
class Run:
    """The parts of a run that a page shows; an empty report or no picture if there is none yet."""

    name: str
    values: dict[str, Any]
    curves: Mapping[str, Points]
    report: Report
    picture: bytes | None
    drawn: str = ""  # caption of the picture: where it comes from

    @cached_property
    def made_by(self) -> Settings:
        """The settings of its evaluation."""
        return of_report(self.report)

    @property
    def weights(self) -> str | None:
        return self.made_by.values.get("weights")

    @property
    def comparable(self) -> Settings:
        """Settings of its evaluation that are compared literally."""
        return self.made_by.without("weights", "seed")

    @property
    def seeds(self) -> set[str]:
        """The seed of its evaluation, as a number and, if it is its run's, as `THE_RUNS`."""
        seed = self.made_by.text("seed")
        return {seed, THE_RUNS} if seed == str(self.values["seed"]) else {seed}


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
    pictures = {folder / f"ode_images_{k}.png": f"evaluation of checkpoint {k}"}
    if snapshots:
        last = max(snapshots)
        pictures[snapshots[last] / "sample.png"] = f"drawn in training, at step {last:,}"
    path = next((path for path in pictures if path.exists()), None)
    picture = None if path is None else page_png(path)
    curves = read_scalars(workdir / "tensorboard")
    return Run(name, config, curves, report, picture, pictures.get(path, ""))


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs that differ in the seed only, in the order of their first runs.

    The configs of a group are equal, and so are the settings of its evaluations. An older report
    without its sampler's settings is a group of its own, and runs without a report are not grouped
    with runs that have one.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        told = run.made_by.complete or "sampling.N" in run.made_by.values
        alone = run.name if run.report and not told else ""
        key = [run.values | {"seed": None}, run.comparable.values, run.made_by.complete]
        key = json.dumps([*key, bool(run.report), alone], sort_keys=True)
        alike.setdefault(key, []).append(run)
    groups: list[list[Run]] = []
    for members in alike.values():
        if common_seeds(members):
            groups.append(members)
            continue
        of_seed: dict[str, list[Run]] = {}
        for run in members:
            of_seed.setdefault(_preferred(run.seeds), []).append(run)
        groups += of_seed.values()
    return sorted(groups, key=lambda group: runs.index(group[0]))


def common_seeds(runs: Iterable[Run]) -> set[str]:
    """Values of `Run.seeds` that all `runs` share: one number, `THE_RUNS`, or both."""
    return set.intersection(*(run.seeds for run in runs))


def _preferred(words: set[str]) -> str:
    return THE_RUNS if THE_RUNS in words else min(words)


def by_seed(group: Sequence[Run]) -> list[list[Run]]:
    """The runs of a group in lists of one seed, or of the same weights."""
    seeds: list[list[Run]] = []
    for run in group:
        for seed in seeds:
            same = (o.weights == run.weights and run.weights is not None for o in seed)
            if seed[0].values["seed"] == run.values["seed"] or any(same):
                seed.append(run)
                break
        else:
            seeds.append([run])
    return seeds


def differing(groups: Sequence[Sequence[Run]]) -> dict[str, list[str]]:
    """{key: the value in each group}, as text, of the settings in which the groups differ.

    Settings of evaluations follow those of configs, as "evaluation: {name}", or share the row of
    the config's key where both have equal texts. Where evaluations used other values of a key
    than the configs, the row of the configs is "default: {key}".
    """
    firsts = [group[0] for group in groups]
    keys = dict.fromkeys(key for run in firsts for key in run.values if key != "seed")
    rows = {key: [str(run.values.get(key)) for run in firsts] for key in keys}
    rows = {key: texts for key, texts in rows.items() if len(set(texts)) > 1}
    evaluated = [k for k, run in enumerate(firsts) if run.report]
    made_by = settings.differing([firsts[k].comparable for k in evaluated])
    of_groups = [common_seeds(groups[k]) for k in evaluated]
    told = [words for words in of_groups if settings.UNKNOWN not in words]
    if told and not set.intersection(*told):
        made_by["seed"] = [*map(_preferred, of_groups)]

    def of_evaluated(key: str) -> tuple[str, list[str]]:
        return key.rpartition(".")[2], [rows[key][k] for k in evaluated]

    said = [*map(of_evaluated, rows)]
    more = {n: t for n, t in made_by.items() if (n.rpartition(".")[2], t) not in said}
    rows = {
        f"default: {key}"
        if evaluated and key.startswith(OF_EVALUATIONS) and made_by.get(key) != of_evaluated(key)[1]
        else key: texts
        for key, texts in rows.items()
    }
    if 0 < len(evaluated) < len(firsts):
        rows["evaluated"] = ["yes" if run.report else "no" for run in firsts]
    for name, texts in more.items():
        of_group = dict(zip(evaluated, texts, strict=True))
        rows[f"evaluation: {name}"] = [of_group.get(k, "") for k in range(len(firsts))]
    return rows


def remarks(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Lines on runs that count once, on weights evaluated twice, and on settings not known."""
    lines = []
    for seed in (seed for group in groups for seed in by_seed(group) if len(seed) > 1):
        weights = {run.weights or run.name for run in seed}
        same = "one seed" if len(weights) > 1 else "the same weights"
        lines.append(f"{_names(seed)}: {same}, with equal settings; they count once.")
    places = [(k, run) for k, group in enumerate(groups) for run in group]
    for weights in dict.fromkeys(run.weights for _, run in places if run.weights):
        holders = [(k, run) for k, run in places if run.weights == weights]
        if len({k for k, _ in holders}) > 1:
            names = _names(run for _, run in holders)
            lines.append(f"{names}: the same weights, evaluated with different settings.")
    if old := [run for group in groups for run in group if run.report and not run.made_by.complete]:
        lines.append(
            f"{_names(old)}: of an older program, whose reports do not have all settings; those "
            f"that do not stand here are {settings.UNKNOWN}. Another --mode eval adds them, and "
            "takes the samples that are there."
        )
    return lines


def compare_page(runs: Sequence[Run], lines: Sequence[str] = ()) -> str:
    """HTML page of one or more runs, with remarks `lines`; all texts are escaped."""
    groups = grouped(runs)
    differ = differing(groups)
    losses, caption = [], "Over steps; where there are many, means of neighbours."
    if kinds := [key for key in differ if key.startswith(OF_LOSS) or key in of_parts()]:
        caption += f" Losses of another {', '.join(kinds)} are of another kind."
    for tag, title in (("loss/train", "Training loss"), ("loss/test", "Held-out loss")):
        curves = [(k, run.curves.get(tag, ())) for k, group in enumerate(groups) for run in group]
        if plot := several(curves, ("step", "loss")):
            losses.append(figure(plot, title, caption))
    shown = [_samples(group) for group in groups if any(run.picture is not None for run in group)]
    title = f"{len(runs)} run{'s' * (len(runs) > 1)} side by side"
    body = [
        f"<header><h1>{title}</h1>{legend(map(_names, groups))}</header>",
        section("Settings that differ", _settings(groups, differ, lines)),
        section("Metrics", _metrics(groups)),
        section("Losses", f"<div class=figures>{''.join(losses)}</div>" if losses else ""),
        section("Samples", f"<div class=strips>{''.join(shown)}</div>" if shown else ""),
    ]
    return document(title, "".join(body))


def of_parts() -> set[str]:
    """The keys that sources, codecs and objectives declare, on which it depends what a loss means.

    Those that `data.` has besides say how data are read, not which they are.
    """
    parts = [*SOURCES.values(), *CODECS.values()]
    of_data = {key for part in parts for key in of_part(part, "keys")}
    return of_data | {key for objective in OBJECTIVES.values() for key in own_keys(objective)}


def _samples(group: Sequence[Run]) -> str:
    """The samples of the first run of the group that has any."""
    run = next(run for run in group if run.picture is not None)
    caption = f"Seed {run.values['seed']}, none chosen{'; ' * bool(run.drawn)}{run.drawn}."
    return picture_html(Picture(run.name, caption, run.picture))


def _names(runs: Iterable[Run]) -> str:
    return ", ".join(run.name for run in runs)


def _settings(
    groups: Sequence[Sequence[Run]], differ: Mapping[str, list[str]], lines: Sequence[str]
) -> str:
    said = notes([*lines, *remarks(groups)])
    if not differ:
        seeds = any(len(by_seed(group)) > 1 for group in groups)
        return f"<p class=note>None{' but the seed' * seeds}.</p>{said}"
    rows = [_row(key, ([value] for value in values)) for key, values in differ.items()]
    return f"<div class='wide lines'>{html_table(['', *map(_short, groups)], rows)}</div>{said}"


def _metrics(groups: Sequence[Sequence[Run]]) -> str:
    """A row for each metric that any run has, a column for each group."""
    reports = [[run.report for run in group if run.report] for group in groups]
    obstacles: dict[str, list[str]] = {}
    rows = [_row("step", ([number(r["step"]) for r in some] for some in reports))]
    for key, metric, _, name, label in entries(*(r for some in reports for r in some)):
        values = [_values(group, key) for group in groups]
        if metric.better:
            best = _best(metric, values)
            reason = obstacle(key, [r for some in reports for r in some if key in r])
            if reason and sum(map(bool, values)) > 1:
                obstacles.setdefault(reason, []).append(name)
            label = f"{label} {'↓' if metric.better < 0 else '↑'}"
            rows.append(_row(label, map(_over_seeds, values), None if reason else best))
    if not any(reports):
        return "<p class=note>No run is evaluated yet.</p>"
    lines = [
        f"{run.name}: {remark}."
        for group in groups
        for run in group
        for remark in remarks_of(run.report)
    ]
    table = html_table(["", *map(_short, groups)], rows)
    return f"<div class='wide lines'>{table}</div>{notes([*not_ranked(obstacles), *lines])}"


def _values(group: Sequence[Run], key: str) -> list[list[float]]:
    """Distinct values of a metric in the runs of a group, for each seed that has any."""
    of_seeds = ([float(run.report[key]) for run in s if key in run.report] for s in by_seed(group))
    return [[*dict.fromkeys(values)] for values in of_seeds if values]


def _row(label: str, cells: Iterable[Sequence[str]], best: int | None = None) -> str:
    """A row of a table; a cell's several texts are joined where they differ."""
    texts = (", ".join(dict.fromkeys(texts)) for texts in cells)
    marked = (
        f"<td{' class=best' if k == best else ''}>{escape(text)}</td>"
        for k, text in enumerate(texts)
    )
    return f"<tr><td>{escape(label)}</td>{''.join(marked)}</tr>"


def _short(group: Sequence[Run]) -> str:
    seeds = len(by_seed(group))
    return group[0].name + (f" ({seeds} seeds)" if seeds > 1 else "")


def _over_seeds(values: Sequence[Sequence[float]]) -> list[str]:
    """Text of the mean and range over several seeds, or of all values of one; [] without values."""
    if len(values) < 2:
        return [number(value) for seed in values for value in seed]
    means = [*map(np.mean, values)]
    return [f"{number(np.mean(means))}\n({number(min(means))} to {number(max(means))})"]


def _best(metric: Metric, values: Sequence[Sequence[Sequence[float]]]) -> int | None:
    """Index of the group with the best mean over seeds; None with a tie or fewer than two."""
    means = {k: metric.better * np.mean([*map(np.mean, v)]) for k, v in enumerate(values) if v}
    means = {k: mean for k, mean in means.items() if math.isfinite(mean)}
    best = [k for k, mean in means.items() if mean == max(means.values())]
    return best[0] if len(means) > 1 == len(best) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the page, HTML")
    parser.add_argument("--eval_folder", default="eval", help="of each workdir")
    options = parser.parse_args()
    try:
        # each is called by its path from the folder that holds them all
        paths = [path.resolve() for path in options.workdirs]
        folder = os.path.commonpath([path.parent for path in paths])
        counts = Counter(os.path.relpath(path, folder) for path in paths)
        twice = [name for name, n in counts.items() if n > 1]
        lines = [f"{name} is named more than once, and shown once." for name in twice]
        runs = [read_run(Path(folder, name), name, options.eval_folder) for name in counts]
        page = compare_page(runs, lines)
        with atomic_write(options.out) as file:
            file.write(page.encode())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join([*lines, f"page: {options.out}"]))


if __name__ == "__main__":
    main()
