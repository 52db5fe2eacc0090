"""Runs, and their groups: those whose configs and evaluations differ in the seed only."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reports.page import Report
from reports.plots import Points
from reports.report_file import page_png, read_report
from reports.settings import CHOSEN_LEVELS, UNKNOWN, Settings, of_report
from reports.settings import differing as differing_settings
from storage import run_config
from storage.tensorboard import read_scalars

OF_EVALUATIONS = ("sampling.", "eval.")  # settings of a run that an evaluation may change
THE_RUNS = "the run's"  # the seed of an evaluation that uses its run's seed


@dataclass(frozen=True, eq=False)
class Run:
    """The parts of a run that a page shows; an empty report or no picture if there is none yet."""

    name: str
    values: dict[str, Any]  # of its config, by key
    curves: Mapping[str, Points]
    report: Report
    picture: bytes | None
    caption: str = ""  # where the picture comes from

    @cached_property
    def made_by(self) -> Settings:
        """The settings of its evaluation."""
        return of_report(self.report)

    @property
    def weights(self) -> str | None:
        """Digest of the weights that were evaluated; None where it is not known."""
        return self.made_by.values.get("weights")

    @property
    def comparable(self) -> Settings:
        """Settings of its evaluation that are compared literally."""
        return self.made_by.without("weights", "seed", CHOSEN_LEVELS)

    @property
    def seeds(self) -> set[str]:
        """The seed of its evaluation, as a number and, if it is its run's, as `THE_RUNS`."""
        seed = self.made_by.text("seed")
        return {seed, THE_RUNS} if seed == str(self.values["seed"]) else {seed}

    def repeats(self, other: "Run") -> bool:
        """Whether both have the same seed or the same weights, and so count as one."""
        same_weights = self.weights is not None and self.weights == other.weights
        return same_weights or self.values["seed"] == other.values["seed"]


Group = Sequence[Run]


def read_run(workdir: Path, name: str, eval_folder: str) -> Run:
    """The run in `workdir`, to be called `name`.

    Its report is that of the last checkpoint evaluated in `eval_folder`, its picture the samples
    of that, else of training's last snapshot. Raises ValueError where nothing there carries a
    config, or a file is damaged.
    """
    values, folder = run_config.flatten(run_config.load(workdir)), workdir / eval_folder
    numbers = [path.stem.removeprefix("report_") for path in folder.glob("report_*.npz")]
    k = max((int(n) for n in numbers if n.isdecimal()), default=None)
    report = {} if k is None else read_report(folder / f"report_{k}.npz")
    pictures = {folder / f"ode_images_{k}.png": f"evaluation of checkpoint {k}"}
    steps = [path.name.removeprefix("iter_") for path in workdir.glob("samples/iter_*")]
    if steps := [int(step) for step in steps if step.isdecimal()]:
        last = workdir / f"samples/iter_{max(steps)}/sample.png"
        pictures[last] = f"drawn in training, at step {max(steps):,}"
    path = next((path for path in pictures if path.exists()), None)
    picture = None if path is None else page_png(path)
    curves = read_scalars(workdir / "tensorboard")
    return Run(name, values, curves, report, picture, pictures.get(path, ""))


def names_of(runs: Iterable[Run]) -> str:
    """The names of `runs`, with commas."""
    return ", ".join(run.name for run in runs)


def grouped(runs: Group) -> list[list[Run]]:
    """Groups of runs that differ in the seed only, in the order of their first runs.

    The configs of a group are equal, and so are the settings of its evaluations. An older report
    without its sampler's settings is a group of its own, and runs without a report are not grouped
    with runs that have one.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        has_sampler = run.made_by.complete or "sampling.N" in run.made_by.values
        alone = run.name if run.report and not has_sampler else ""
        key = [run.values | {"seed": None}, run.comparable.values, run.made_by.complete]
        key = json.dumps([*key, bool(run.report), alone], sort_keys=True)
        alike.setdefault(key, []).append(run)
    groups: list[list[Run]] = []
    for members in alike.values():
        of_seed: dict[str, list[Run]] = {}
        for run in members:
            seed = "" if common_seeds(members) else _preferred(run.seeds)
            of_seed.setdefault(seed, []).append(run)
        groups += of_seed.values()
    return sorted(groups, key=lambda group: runs.index(group[0]))


def common_seeds(runs: Iterable[Run]) -> set[str]:
    """Values of `Run.seeds` that all `runs` share: one number, `THE_RUNS`, or both."""
    return set.intersection(*(run.seeds for run in runs))


def _preferred(seeds: set[str]) -> str:
    return THE_RUNS if THE_RUNS in seeds else min(seeds)


def by_seed(group: Group) -> list[list[Run]]:
    """The runs of a group, in lists of runs that count as one."""
    seeds: list[list[Run]] = []
    for run in group:
        alike = (seed for seed in seeds if any(map(run.repeats, seed)))
        if seed := next(alike, None):
            seed.append(run)
        else:
            seeds.append([run])
    return seeds


def differing(groups: Sequence[Group]) -> dict[str, list[str]]:
    """{key: the value in each group}, as text, of the settings in which the groups differ.

    Settings of evaluations follow those of configs, as "evaluation: {name}", or share the row of
    the config's key where both have equal texts. Where evaluations used other values of a key
    than the configs, the row of the configs is "default: {key}".
    """
    firsts = [group[0] for group in groups]
    keys = dict.fromkeys(key for run in firsts for key in run.values if key != "seed")
    of_configs = {key: [str(run.values.get(key)) for run in firsts] for key in keys}
    of_configs = {key: texts for key, texts in of_configs.items() if len({*texts}) > 1}
    evaluated = [k for k, run in enumerate(firsts) if run.report]
    of_evaluations = differing_settings([firsts[k].comparable for k in evaluated])
    seeds = [common_seeds(groups[k]) for k in evaluated]
    if (sets := [each for each in seeds if UNKNOWN not in each]) and not set.intersection(*sets):
        of_evaluations["seed"] = [*map(_preferred, seeds)]

    rows, both = {}, []
    for key, texts in of_configs.items():
        at_evaluated = [texts[k] for k in evaluated]
        both.append((key.rpartition(".")[2], at_evaluated))
        replaced = key.startswith(OF_EVALUATIONS) and of_evaluations.get(key) != at_evaluated
        rows[f"default: {key}" if evaluated and replaced else key] = texts
    if 0 < len(evaluated) < len(firsts):
        rows["evaluated"] = ["yes" if run.report else "no" for run in firsts]
    for name, texts in of_evaluations.items():
        if (name.rpartition(".")[2], texts) not in both:
            of_group = dict(zip(evaluated, texts, strict=True))
            rows[f"evaluation: {name}"] = [of_group.get(k, "") for k in range(len(firsts))]
    return rows


def remarks(groups: Sequence[Group]) -> list[str]:
    """Lines on runs that count once, on weights evaluated twice, and on settings not known."""
    lines = []
    for seed in (seed for group in groups for seed in by_seed(group) if len(seed) > 1):
        weights = {run.weights or run.name for run in seed}
        same = "one seed" if len(weights) > 1 else "the same weights"
        lines.append(f"{names_of(seed)}: {same}, with equal settings; they count once.")
    holders: dict[str, list[tuple[int, Run]]] = {}
    for k, run in ((k, run) for k, group in enumerate(groups) for run in group if run.weights):
        holders.setdefault(run.weights, []).append((k, run))
    for places in holders.values():
        if len({k for k, _ in places}) > 1:
            names = names_of(run for _, run in places)
            lines.append(f"{names}: the same weights, evaluated with different settings.")
    if old := [run for group in groups for run in group if run.report and not run.made_by.complete]:
        lines.append(
            f"{names_of(old)}: of an older program, whose reports do not have all settings; those "
            f"that do not stand here are {UNKNOWN}. Another --mode eval adds them, and takes the "
            "samples that are there."
        )
    return lines
