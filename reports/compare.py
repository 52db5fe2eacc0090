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
import os.path
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.keys import of_part, with_home
from losses import OBJECTIVES, own_keys
from metrics.table import entries, interval_of, range_of
from metrics.table import remarks as remarks_on_metrics
from reports import streams
from reports.html import Picture, document, figure, legend, notes, row, section, table
from reports.page import best_of, not_ranked, reason_not_to_rank
from reports.plots import curve_plot, number
from reports.runs import Group, Run, by_seed, differing, grouped, names_of, read_run, remarks
from sources import SOURCES
from sources.codec import CODECS
from storage.files import atomic_write

# Settings, or prefixes of their names, that decide whether losses can be compared.
OF_LOSS = (
    *("data.dataset", "data.image_size", "data.num_channels", "data.num_classes"),
    *("data.conditions", "data.codec", "data.random_flip", "data.uniform_dequantization"),
    *("training.objective", "training.sde", "training.batch_size", "training.reduce_mean"),
    *("training.target", "training.likelihood_weighting", "training.continuous"),
    *("training.gamma", "training.tau", "training.M", "training.restrict_M", "model.D"),
    *("model.sigma_", "model.beta_", "model.P_"),
)
INTERVALS = (
    "In square brackets: the range of 95 % of the values that other draws of as many samples would "
    "have (docs/metrics.md)."
)


def compare_page(runs: Sequence[Run], lines: Sequence[str] = ()) -> str:
    """HTML page of one or more runs, with remarks `lines`; all texts are escaped."""
    groups = grouped(runs)
    differ = differing(groups)
    title = f"{len(runs)} run{'s' * (len(runs) > 1)} side by side"
    samples = [_samples(group) for group in groups if any(run.picture for run in group)]
    content = [
        f"<header><h1>{title}</h1>{legend(map(names_of, groups))}</header>",
        section("Settings that differ", _settings(groups, differ, lines)),
        section("Metrics", _metrics(groups)),
        section("Losses", _losses(groups, differ)),
        section("Samples", f"<div class=strips>{''.join(samples)}</div>" if samples else ""),
    ]
    return document(title, "".join(content))


def _settings(
    groups: Sequence[Group], differ: Mapping[str, list[str]], lines: Sequence[str]
) -> str:
    below = notes([*lines, *remarks(groups)])
    if not differ:
        seeds = any(len(by_seed(group)) > 1 for group in groups)
        return notes([f"None{' but the seed' * seeds}."]) + below
    rows = [row([key, *values]) for key, values in differ.items()]
    return _table(groups, rows) + below


def _table(groups: Sequence[Group], rows: Sequence[str]) -> str:
    """A table with a column for each group, called as its first run."""
    numbers = [len(by_seed(group)) for group in groups]
    names = [
        group[0].name + (f" ({seeds} seeds)" if seeds > 1 else "")
        for group, seeds in zip(groups, numbers, strict=True)
    ]
    return table(["", *names], rows, "wide lines")


def _metrics(groups: Sequence[Group]) -> str:
    """A row for each metric that any run has, a column for each group."""
    reports = [[run.report for run in group if run.report] for group in groups]
    every = [report for of_group in reports for report in of_group]
    if not every:
        return notes(["No run is evaluated yet."])
    steps = (dict.fromkeys(number(report["step"]) for report in of_group) for of_group in reports)
    rows, obstacles = [row(["step", *map(", ".join, steps)])], {}
    for key, metric, _, name, label in entries(*every):
        if not metric.better:
            continue
        values = [_values(group, key) for group in groups]
        means = {k: float(np.mean([*map(np.mean, v)])) for k, v in enumerate(values) if v}
        best = best_of(means, metric.better)
        if reason := reason_not_to_rank(key, [report for report in every if key in report]):
            best = []
            if len(means) > 1:
                obstacles.setdefault(reason, []).append(name)
        arrow = "↓" if metric.better < 0 else "↑"
        cells = [f"{label} {arrow}", *(_cell(group, key) for group in groups)]
        rows.append(row(cells, [best[0] + 1] if len(best) == 1 else ()))
    has_intervals = any("\n[" in each for each in rows)
    lines = [INTERVALS] * has_intervals + [
        f"{run.name}: {remark}."
        for group in groups
        for run in group
        for remark in remarks_on_metrics(run.report)
    ]
    return _table(groups, rows) + notes([*not_ranked(obstacles), *lines])


def _values(group: Group, key: str) -> list[list[float]]:
    """Distinct values of a metric in the runs of a group, for each seed that has any."""
    of_seeds = ([float(run.report[key]) for run in s if key in run.report] for s in by_seed(group))
    return [[*dict.fromkeys(values)] for values in of_seeds if values]


def _cell(group: Group, key: str) -> str:
    """Text of a metric of a group; a single value has its interval or range below it."""
    values = _values(group, key)
    reports = [run.report for run in group if key in run.report]
    if sum(map(len, values)) == 1 and (ends := interval_of(reports[0], key)):
        return f"{_over_seeds(values)}\n[{number(ends[0])}, {number(ends[1])}]"
    if sum(map(len, values)) == 1 and (ends := range_of(reports[0], key)):
        of_sets = f"{number(ends[0])} to {number(ends[1])}, {number(reports[0]['repeats'])} sets"
        return f"{_over_seeds(values)}\n({of_sets})"
    return _over_seeds(values)


def _over_seeds(values: Sequence[Sequence[float]]) -> str:
    """Text of the mean and range over several seeds, or of all values of one; "" without any."""
    if len(values) < 2:
        return ", ".join(dict.fromkeys(number(value) for seed in values for value in seed))
    means = [*map(np.mean, values)]
    return f"{number(np.mean(means))}\n({number(min(means))} to {number(max(means))})"


def _losses(groups: Sequence[Group], differ: Iterable[str]) -> str:
    figures, caption = [], "Over steps; where there are many, means of neighbours."
    if kinds := [key for key in differ if key.startswith(OF_LOSS) or key in of_parts()]:
        caption += f" Losses of another {', '.join(kinds)} are of another kind."
    for tag, title in (("loss/train", "Training loss"), ("loss/test", "Held-out loss")):
        curves = [(k, run.curves.get(tag, ())) for k, group in enumerate(groups) for run in group]
        if plot := curve_plot(curves, ("step", "loss")):
            figures.append(figure(plot, title, caption))
    return f"<div class=figures>{''.join(figures)}</div>" if figures else ""


def of_parts() -> set[str]:
    """The keys that sources, codecs and objectives declare, on which it depends what a loss means.

    Those that `data.` has besides say how data are read, not which they are.
    """
    parts = [*SOURCES.values(), *CODECS.values()]
    of_data = {key for part in parts for key in of_part(part, "keys")}
    return of_data | {key for objective in OBJECTIVES.values() for key in own_keys(objective)}


def _samples(group: Group) -> str:
    """The samples of the first run of the group that has any."""
    run = next(run for run in group if run.picture is not None)
    caption = f"Seed {run.values['seed']}, none chosen{'; ' * bool(run.caption)}{run.caption}."
    return Picture(run.name, caption, run.picture).html()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the page, HTML")
    parser.add_argument("--eval_folder", default="eval", help="of each workdir")
    options = parser.parse_args()
    try:
        out = Path(with_home("--out", str(options.out)))
        # each is called by its path from the folder that holds them all
        paths = [path.resolve() for path in options.workdirs]
        folder = os.path.commonpath([path.parent for path in paths])
        counts = Counter(os.path.relpath(path, folder) for path in paths)
        twice = [name for name, n in counts.items() if n > 1]
        lines = [f"{name} is named more than once, and shown once." for name in twice]
        runs = [read_run(Path(folder, name), name, options.eval_folder) for name in counts]
        page = compare_page(runs, lines)
        with atomic_write(out) as file:
            file.write(page.encode(errors="backslashreplace"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join([*lines, f"page: {out}"]))


if __name__ == "__main__":
    streams.make_lenient()
    main()
