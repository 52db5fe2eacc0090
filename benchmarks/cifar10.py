"""Train PFGM++ on CIFAR-10 for an hour on one GPU, and evaluate it: `make cifar10 DATA=FILE`.

    python3 benchmarks/cifar10.py FILE [--hours 1] [--workdir runs/cifar10] [--inception NETWORK]

FILE is EDM's cifar10-32x32.zip, or cifar-10-python.tar.gz of CIFAR's authors. First a training step
is measured in each form of `make gpu`, in as few micro-batches as fit on the card. The network is
then trained in the fastest form, for as many steps as that takes in an hour; the learning rate
rises over the published share of them. The same command resumes a run that was stopped. The table
is written to docs/gpu-{card}-cifar-10.md, the figures to the JSON file beside it, which users are
asked to send. The Frechet distance is measured in pixels; with NETWORK, a file of NVIDIA's
Inception, it is the published FID.
"""

import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import common
import gpu
import numpy as np
import self_check

from library.signals import stop_signals
from storage.files import atomic_write

CONFIG = "pfgmpp.cifar10_ddpmpp"
IMAGES = 512  # batch size, as published
DATA = {"data.dataset": "folder", "data.num_channels": 3, "data.num_classes": 0}
EVALUATION = {"eval.enable_loss": True, "eval.steps": "last", "eval.batch_size": 500}
STEPS = 10  # measured steps of each form
METRICS = {"fid": "Frechet distance", "kid": "kernel distance", "loss": "held-out loss"}


def options_of(data: Path, inception: str | None) -> dict:
    """Options of the data and of the evaluation; EDM's zip has no images to hold out."""
    features = {"eval.features": "pixels"}
    if inception:
        features = {"eval.features": "network:inception", "eval.inception_path": inception}
    held_out = {"data.held_out": 0} if data.suffix == ".zip" else {}
    return {**DATA, "data.path": str(data), **held_out, **EVALUATION, **features}


def schedule(steps: int) -> dict:
    """Options of a training of `steps` steps, with the published proportions.

    In a short training the learning rate also falls at the end, and the EMA is relatively longer.
    """
    return {
        "training.n_iters": steps,
        "training.snapshot_freq": -(-steps // 4),
        "training.snapshot_freq_for_preemption": max(1, steps // 20),
        "training.eval_freq": max(1, steps // 20),
        "optim.warmup": steps // 20,
        "optim.cooldown": steps // 4,
        "model.ema_half_life": IMAGES * steps / 100,
    }


def fastest(options: dict) -> tuple[dict, list[gpu.Row]]:
    """Options of the form in which a step is fastest, and a row of the table for each form.

    Raises RuntimeError where a step works in no form.
    """
    rows, forms = [], {}

    def measure(of_form: dict) -> gpu.Figures:
        config = self_check.config_of(CONFIG, {**options, **of_form})
        accumulate, _ = self_check.fitting_accumulate(config)
        figures = gpu.step_figures(config, STEPS)
        forms[figures.seconds] = {**of_form, "training.accumulate": accumulate}
        return figures

    for form, of_form in gpu.TRAINING.items():
        part = f"a training step of {IMAGES} images"
        rows.append(gpu.Row(part, form, gpu.attempt(functools.partial(measure, of_form))))
    if not forms:
        raise RuntimeError(f"a training step works in no form: {rows[0].figures.rate}")
    best = forms[min(forms)]
    return {**best, "sampling.precision": best.get("training.precision", "fp32")}, rows


def planned(path: Path, options: dict, hours: float) -> tuple[dict, list[gpu.Row]]:
    """Options of the training and rows of `fastest`, measured now or read from the first start.

    The program ends with one line where the first start was one of other `hours`.
    """
    if path.exists():
        plan = json.loads(path.read_text())
        if plan["hours"] != hours:
            sys.exit(
                f"{path} is the plan of {plan['hours']:g} hours: go on with --hours "
                f"{plan['hours']:g}, or begin another run with --workdir"
            )
    else:
        best, rows = fastest(options)
        seconds = min(row.figures.seconds for row in rows if row.figures.seconds > 0)
        plan = {"hours": hours}
        plan["options"] = {**options, **best, **schedule(max(4, int(3600 * hours / seconds)))}
        plan["rows"] = [(row.part, row.form, row.figures) for row in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(plan).encode())
    rows = [gpu.Row(part, form, gpu.Figures(*values)) for part, form, values in plan["rows"]]
    return plan["options"], rows


def run(mode: str, workdir: Path, options: dict) -> None:
    """Run main.py; end this program with its exit status if that is not 0."""
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    command = [sys.executable, str(gpu.ROOT / "main.py"), "--mode", mode, "--workdir", str(workdir)]
    command += ["--config", str(gpu.ROOT / f"configs/{CONFIG.replace('.', '/')}.py"), *flags]
    print(shlex.join(command), flush=True)
    if status := start(command):
        sys.exit(status)


def start(command: list[str]) -> int:
    """Run a program and return its exit status; it gets Ctrl-C too, and saves its state."""
    with stop_signals(), subprocess.Popen(command) as process:
        return process.wait()


def evaluated(workdir: Path) -> Iterator[gpu.Case]:
    """Rows of the table, one for each number of the newest report."""
    path = max((workdir / "eval").glob("report_*.npz"), key=lambda path: path.stat().st_mtime)
    with np.load(path) as report:
        values = {key: report[key].item() for key in METRICS if key in report.files}
        part = f"step {report['step']:,}, {report['num_samples']:,} samples"
    for key, value in values.items():
        yield part, METRICS[key], functools.partial(gpu.Figures, rate=f"{value:.4g}")


def main() -> None:
    arguments = common.options(
        __doc__, "data", hours=1.0, workdir=str(gpu.ROOT / "runs/cifar10"), inception=""
    )
    device, workdir = common.card(), Path(arguments.workdir)
    plan = workdir.with_name(f"{workdir.name}.json")
    options = options_of(arguments.data[0].absolute(), arguments.inception)
    options, rows = planned(plan, options, arguments.hours)
    run("train", workdir, options)
    run("eval", workdir, options)
    measured = [(row.part, row.form, functools.partial(gpu.Figures, *row.figures)) for row in rows]
    words = f"configs/{CONFIG.replace('.', '/')}.py for {arguments.hours:g} h: "
    words += ", ".join(f"{key}={value}" for key, value in options.items() if key != "data.path")
    facts = [f"{common.setting(device)}.", "", words]
    cases = [*measured, *evaluated(workdir)]
    title = f"{common.device_name(device)} CIFAR-10"
    path = gpu.write(gpu.PAGES, title, facts, cases, "make cifar10")
    print(f"table: {path}; to be sent: {path.with_suffix('.json')}")


if __name__ == "__main__":
    main()
