"""Train and evaluate each recipe with each seed, one run after another, and write a table.

    python3 -m benchmarks.recipes FILE

FILE is TOML; benchmarks/digits.toml makes the table in README:

    folder = "runs/digits"                     # of workdirs, logs/, table.md and compare.html
    seeds = [1, 2, 3]
    overrides = { training.n_iters = 2000 }    # of every recipe; may be left out
    floor_draws = 1000                         # may be left out

    [columns]                                  # title = "entry of a report, format of its numbers"
    "Frechet distance" = "fid .4f"
    "seconds" = "training_seconds .0f"         # of runs that log to TensorBoard

    [[recipes]]
    name = "PFGM++, D = 16"
    config = "configs/pfgmpp/digits_ddpmpp.py"
    overrides = { model.D = 16 }

    [[recipes]]                                # another evaluation of the same runs
    name = "PFGM++, D = 16, `rk45`"
    evaluates = "PFGM++, D = 16"
    overrides = { sampling.ode_solver = "rk45" }

    [[recipes]]                                # training goes on from the weights of the same seed
    name = "one evaluation"
    config = "configs/pfgmpp/digits_consistency.py"
    starts_from = "PFGM++, D = 16"             # training_seconds count both trainings
    overrides = { sampling.N = 1 }

The same command goes on after a kill: a finished training or evaluation is not repeated, and a
training that has begun is resumed. A recipe that fails is named with its log, the others go on, and
the exit status is 1. Cells of the table are means over the seeds, with ranges in brackets. With
`floor_draws`, the first row is the floor: the Frechet distance, in pixels, of training images drawn
with replacement, as many as a run has samples; the mean of `floor_draws` such draws, and the range
of 95 % of them. The row is left out where the distances of the runs are in another space.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from ml_collections import ConfigDict

from configs.keys import flatten
from datasets import batch_at
from experiment import load
from metrics.distances import Gaussian, frechet_distance
from metrics.features import get_space
from reports import streams
from reports.compare import compare_page
from reports.images import channels_last
from reports.progress import progress_bar
from reports.runs import OF_EVALUATIONS, Run, read_run
from storage.files import atomic_write, read_json
from storage.run_checkpoints import peek
from storage.tensorboard import seconds_of_training

MAIN = Path(__file__).parent.parent / "main.py"
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # see prctl(2)
NINETY_FIVE = (2.5, 97.5)  # percentiles between which 95 % of the draws lie

Settings = dict[str, Any]  # the file of a config, and values by key that override its own
Show = Callable[[str], None]


class Failed(Exception):
    """A part of a recipe cannot be finished; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Attributes:
        base: the recipe whose runs this row evaluates in another way; None if it trains its own.
        start: the recipe whose weights the training starts from; None for new weights.
    """

    name: str
    settings: Settings
    base: Self | None = None
    start: Self | None = None

    @property
    def slug(self) -> str:
        """The name in letters that suit files."""
        return re.sub(r"[^a-z0-9.+]+", "_", self.name.lower()).strip("_")

    @property
    def eval_folder(self) -> str:
        return f"eval_{self.slug}" if self.base else "eval"

    def workdir(self, seed: int) -> str:
        """The name of the workdir."""
        return f"{(self.base or self).slug}-s{seed}"


@dataclass
class Plan:
    """The content of a file of recipes, and the parts of it that are done.

    Attributes:
        columns: by their titles, entries of a report and the formats of their numbers.
        done: settings of trainings that have begun and of evaluations that are finished.
    """

    folder: Path
    seeds: list[int]
    columns: dict[str, tuple[str, str]]
    recipes: list[Recipe]
    floor_draws: int = 0
    done: dict[str, Settings] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The plan in the file at `path`; ValueError, in one line, where that is not a plan."""
        with path.open("rb") as file:
            content = tomllib.load(file)
        common = flatten(ConfigDict(content.pop("overrides", {})))
        _check_keys(
            content, ("folder", "seeds", "columns", "recipes"), ("floor_draws",), "the file"
        )
        columns = {title: tuple(words.split()) for title, words in content["columns"].items()}
        for title, words in columns.items():
            if len(words) != 2:
                raise ValueError(f"the column {title!r} needs an entry and a format, as 'fid .4f'")
        recipes: dict[str, Recipe] = {}
        for entry in content["recipes"]:
            recipe = _recipe(entry, common, recipes)
            if recipe.slug in [other.slug for other in recipes.values()]:
                raise ValueError(f"two recipes are called {recipe.name!r}, or nearly so")
            recipes[recipe.name] = recipe
        content |= {"folder": Path(content["folder"]), "columns": columns}
        plan = cls(**content | {"recipes": [*recipes.values()]})
        with contextlib.suppress(FileNotFoundError):
            plan.done = read_json(plan.record, "does not say what is done")
        return plan

    @property
    def record(self) -> Path:
        """The path of the file that keeps `done`."""
        return self.folder / "done.json"

    def finish(self, recipe: Recipe, seed: int, show: Show) -> None:
        """Train and evaluate what is not done; raise `Failed` where that is not possible."""
        settings, workdir = recipe.settings | {"seed": seed}, self.folder / recipe.workdir(seed)
        self._check_unchanged(workdir, self._training(recipe.base or recipe, seed))
        if not is_trained(workdir):
            for needed in filter(None, (recipe.base, recipe.start)):
                if not is_trained(self.folder / needed.workdir(seed)):
                    raise Failed(f"{needed.name} is not trained")
            training = self._training(recipe, seed)
            self._note(workdir.name, training)
            self._run("train", workdir, _flags(training), workdir.name, show)
            if not is_trained(workdir):
                raise Failed("its training was stopped; start this program again")
        if not self.is_evaluated(recipe, seed):
            overrides = {key: value for key, value in settings.items() if key != "config"}
            flags = [f"--eval_folder={recipe.eval_folder}", *_flags(overrides)]
            self._run("eval", workdir, flags, f"{recipe.slug}-s{seed}", show)
            self._note(f"{workdir.name}/{recipe.eval_folder}", settings)

    def _training(self, recipe: Recipe, seed: int) -> Settings:
        """Settings of the training with one seed."""
        settings = recipe.settings | {"seed": seed}
        if recipe.start:
            settings["training.init_from"] = str(self.folder / recipe.start.workdir(seed))
        return settings

    def is_evaluated(self, recipe: Recipe, seed: int) -> bool:
        """Whether there is a report made with the settings of the recipe."""
        name = f"{recipe.workdir(seed)}/{recipe.eval_folder}"
        is_done = self.done.get(name) == recipe.settings | {"seed": seed}
        return is_done and any(self.folder.glob(f"{name}/report_*.npz"))

    def _check_unchanged(self, workdir: Path, settings: Settings) -> None:
        """Raise `Failed` where the training began with other settings."""
        begun = self.done.get(workdir.name, settings) if workdir.exists() else settings
        for key in begun | settings:
            was, now = begun.get(key), settings.get(key)
            if was != now and not key.startswith(OF_EVALUATIONS):
                raise Failed(
                    f"{key} was {was} when its training began, and is {now} now: remove {workdir}, "
                    "or give the recipe another name"
                )

    def _note(self, name: str, settings: Settings) -> None:
        self.done[name] = settings
        with atomic_write(self.record) as file:
            file.write(json.dumps(self.done, indent=1).encode())

    def _run(self, mode: str, workdir: Path, flags: list[str], name: str, show: Show) -> None:
        """Run main.py; `show` the last line of its log each second."""
        command = [sys.executable, str(MAIN), f"--mode={mode}", f"--workdir={workdir}", *flags]
        log = self.folder / "logs" / f"{name}-{mode}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"{shlex.join(command)}\n".encode())
            file.flush()
            process = start(command, file)
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                show(f"{mode}: {_last_line(log):.60}")
        if (code := process.returncode) not in (0, os.EX_TEMPFAIL):  # done, or stopped
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else _last_line(log)
            raise Failed(f"--mode {mode}: {reason} (log: {log})")

    def evaluated(self) -> dict[str, list[Run]]:
        """The runs of each recipe, by its name, as far as they are evaluated."""
        runs = {}
        for recipe in self.recipes:
            folder = recipe.eval_folder
            names = [recipe.workdir(s) for s in self.seeds if self.is_evaluated(recipe, s)]
            runs[recipe.name] = [
                read_run(self.folder / name, f"{name}/{folder}", folder) for name in names
            ]
        return runs

    def table(self, runs: dict[str, list[Run]]) -> list[str]:
        """Lines of Markdown: titles, the floor, and a row of each recipe that has `runs`."""
        reports = {name: [*map(self._numbers, of_recipe)] for name, of_recipe in runs.items()}
        rows = [["method", *self.columns], ["---"] * (1 + len(self.columns))]
        first = next((of_recipe[0] for of_recipe in runs.values() if of_recipe), None)
        if first and self.floor_draws and _is_in_pixels(first):
            workdir, number = self.folder / first.name, int(first.report["num_samples"])
            draws = floor(workdir.parent, number, self.floor_draws)
            rows.append(["training images", *self._cells([{"fid": d} for d in draws], NINETY_FIVE)])
        for name, of_recipe in reports.items():
            few = f" ({len(of_recipe)} of {len(self.seeds)} seeds)"
            if of_recipe:
                name += few * (len(of_recipe) < len(self.seeds))
                rows.append([name, *self._cells(of_recipe)])
        return [f"| {' | '.join(row)} |" for row in rows]

    def _numbers(self, run: Run) -> dict[str, float]:
        """Numbers that a row may show of a run: those of its report, and its `training_seconds`."""
        workdir, step = (self.folder / run.name).parent, int(run.report["step"])
        seconds = seconds_of_training(workdir / "tensorboard", step)
        while start := self.done.get(workdir.name, {}).get("training.init_from"):
            workdir = Path(start)
            seconds += seconds_of_training(workdir / "tensorboard", sys.maxsize)
        return dict(run.report) | ({"training_seconds": seconds} if seconds else {})

    def _cells(self, numbers: Sequence[dict], percentiles: tuple = (0, 100)) -> list[str]:
        cells = []
        for entry, kind in self.columns.values():
            values = [float(each[entry]) for each in numbers if entry in each]
            texts = [format(x, kind) for x in np.percentile(values or [0], percentiles)]
            spread = f" ({'-'.join(texts)})" if len({*texts}) > 1 else ""
            cells.append(f"{np.mean(values):{kind}}{spread}" if values else "")
        return cells


def _is_in_pixels(run: Run) -> bool:
    """Whether the Frechet distance of a run is one of pixels."""
    return str(run.report.get("features", "")).split(",")[0] == "pixels"


def _check_keys(
    entry: dict, needed: Collection[str], optional: Collection[str], title: str
) -> None:
    for key in needed:
        if key not in entry:
            raise ValueError(f"{title} has no {key}")
    for key in entry:
        if key not in (*needed, *optional):
            raise ValueError(
                f"{title} has {key}, which is none of {', '.join(needed)}, {', '.join(optional)}"
            )


def _recipe(entry: dict, common: Settings, others: dict[str, Recipe]) -> Recipe:
    """The recipe of an `entry` of the file; `others` stand before it."""
    title = f"the recipe {entry.get('name')!r}"
    _check_keys(entry, ("name",), ("config", "evaluates", "starts_from", "overrides"), title)
    overrides = flatten(ConfigDict(entry.get("overrides", {})))
    if ("config" in entry) == ("evaluates" in entry):
        raise ValueError(f"{title} needs a config, or the name of a recipe that it evaluates")
    needed = {key: others.get(entry[key]) for key in ("evaluates", "starts_from") if key in entry}
    for key, other in needed.items():
        if other is None or other.base:
            raise ValueError(f"{title} {key} {entry[key]!r}, which is not trained above it")
    if "config" in entry:
        settings = {"config": entry["config"]} | common | overrides
        return Recipe(entry["name"], settings, start=needed.get("starts_from"))
    base = needed["evaluates"]
    return Recipe(entry["name"], base.settings | overrides, base)


def _flags(settings: Settings) -> list[str]:
    """The flags of main.py for `settings`."""
    flags = []
    for key, value in settings.items():
        name = key if key == "config" else f"config.{key}"
        flags.append(f"--{name}={tuple(value) if isinstance(value, list) else value}")
    return flags


def start(command: list[str], log: BinaryIO) -> subprocess.Popen:
    """Start a program that is told to save and stop when this one ends, however it ends."""

    def follow() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    streams_of_log = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, preexec_fn=follow, **streams_of_log)


def is_trained(workdir: Path) -> bool:
    """Whether the run in `workdir` is at the last step of its config."""
    newest = peek(workdir)
    return newest is not None and newest[1]["step"] >= newest[1]["config"]["training.n_iters"]


def _last_line(log: Path) -> str:
    """The last line, or state of a progress bar, at the end of `log`."""
    text = log.read_bytes()[-4096:].decode(errors="replace")
    return " ".join(next(filter(str.strip, reversed(re.split(r"[\r\n]", text))), "").split())


def floor(workdir: Path, number: int, draws: int) -> list[float]:
    """Frechet distances, in pixels, of `number` training images from all of the run's.

    They are drawn with replacement, `draws` times.
    """
    parts = load(workdir, fits=False, trust=True).experiment
    train = parts.data.get("train")
    images = channels_last(batch_at(train, slice(len(train))).images)
    features, _ = get_space("pixels", "", parts.codec, parts.device)(images)
    reference, rng = Gaussian.fit(features), np.random.default_rng(0)
    rows = (rng.integers(len(features), size=number) for _ in range(draws))
    return [frechet_distance(Gaussian.fit(features[each]), reference) for each in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="the recipes, TOML")
    path, failures = parser.parse_args().file, []
    try:
        plan = Plan.read(path)
    except (OSError, ValueError, TypeError) as error:
        parser.error(f"{path}: {error}")
    parts = [(recipe, seed) for recipe in plan.recipes for seed in plan.seeds]
    with progress_bar(total=len(parts), unit="run") as progress:

        def show(text: str) -> None:
            progress.set_postfix_str(text, refresh=sys.stderr.isatty())

        for recipe, seed in parts:
            title = f"{recipe.name}, seed {seed}"
            progress.set_description(title)
            try:
                plan.finish(recipe, seed, show)
            except (Failed, ValueError, OSError) as error:
                failures.append(f"{title}: {error}")
                progress.write(failures[-1])
            progress.update()
    runs = plan.evaluated()
    if not any(runs.values()):
        sys.exit("nothing is evaluated, so there is no table")
    lines = plan.table(runs)
    page = compare_page([run for of_recipe in runs.values() for run in of_recipe])
    for name, text in (("table.md", "\n".join([*lines, ""])), ("compare.html", page)):
        with atomic_write(plan.folder / name) as file:
            file.write(text.encode(errors="backslashreplace"))
    print("\n".join([*lines, "", *failures, f"table and page: {plan.folder}"]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    streams.make_lenient()
    main()
