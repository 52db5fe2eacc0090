"""Logs of a training: no step twice after any kill, failures that end no run, metrics, the best."""

import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace

import fake_wandb
import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import linalg
from test_small_runs import STEPS as STEPS_OF_ODE
from test_small_runs import TINY, report_of, tiny
from warm_start import Program, run_main

import run_lib
from datasets import get_dataset
from experiment import Experiment, load
from library import training_run
from library.training_metrics import Best, FewSamples, metrics_of, noise_of
from library.training_run import TrainingRun
from metrics.distances import Gaussian
from metrics.reference import Reference
from metrics.table import Comparison
from sources.keyed import keyed_generator
from storage import loggers
from storage.checkpoints import load_checkpoint, save_checkpoint
from storage.loggers import JsonLines, Logger, Loggers
from storage.tensorboard import read_scalars

STEPS, SAVED, MEASURED = 24, 7, 4  # steps, between saves, between metrics
METRICS = ("metrics/fid", "metrics/kid")


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# --- metrics.jsonl --------------------------------------------------------------------------------


def write(workdir, step, steps):
    with Loggers("jsonl", workdir, step, {}) as logs:
        for each in steps:
            logs.add_scalars({"loss/train": each / 2}, each)
        assert "jsonl" in logs.loggers


def test_lines_beyond_the_step_of_a_resumed_run_are_dropped(tmp_path):
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 4, range(5, 7))
    assert [(line["step"], line["loss/train"]) for line in lines_of(tmp_path)] == [
        (step, step / 2) for step in range(1, 7)
    ]
    write(tmp_path, 0, [])
    assert lines_of(tmp_path) == []


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "sec', b'{"step": 3, "seconds": 1.0}', b"\0" * 100 + b"\n", b"[4]\n"]
)
def test_a_torn_line_is_dropped(tmp_path, torn):
    write(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    write(tmp_path, 9, [10])
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 10]


def test_a_step_that_is_logged_again_is_one_line(tmp_path):
    """Metrics that a signal prevented are computed, and logged, by the next start."""
    write(tmp_path, 0, [1, 2, 3])
    with Loggers("jsonl", tmp_path, 3, {}) as logs:
        logs.add_scalars({"metrics/fid": 5.0}, 3)
    *before, last = lines_of(tmp_path)
    assert [line["step"] for line in before] == [1, 2]
    assert last.items() >= {"step": 3, "loss/train": 1.5, "metrics/fid": 5.0}.items()


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    with Loggers("jsonl", tmp_path, 0, {}) as logs:
        logs.add_scalars({"a": np.float32(0.5), "b": float("nan"), "c": float("inf")}, 1)
        logs.add_scalars({}, 2)

    def refuse(word):
        raise AssertionError(word)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=refuse)
    assert {tag: values[tag] for tag in "abc"} == {"a": 0.5, "b": None, "c": None}


def test_seconds_go_on_where_a_run_is_resumed(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    log = JsonLines(tmp_path, 0, {})
    now[0] = 103.0
    log.add_scalars({"a": 1.0}, 1)
    now[0] = 105.0
    log.add_scalars({"a": 1.0}, 2)
    now[0] = 900.0
    log = JsonLines(tmp_path, 1, {})
    now[0] = 902.5
    log.add_scalars({"a": 1.0}, 2)
    assert [line["seconds"] for line in lines_of(tmp_path)] == [3.0, 5.5]


@pytest.mark.parametrize("kind", ["link", "hard link", "FIFO", "folder", "full"])
def test_what_cannot_be_written_is_one_line_and_never_followed(tmp_path, kind, caplog, monkeypatch):
    path, other_file = tmp_path / "run/metrics.jsonl", tmp_path / "theirs"
    other_file.write_text("keep")
    path.parent.mkdir()
    make = {
        "link": lambda: path.symlink_to(other_file),
        "hard link": lambda: path.hardlink_to(other_file),
        "FIFO": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "full": lambda: monkeypatch.setattr(loggers, "open_regular", no_space),
    }

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device", str(path))

    make[kind]()
    with Loggers("jsonl,tensorboard", path.parent, 0, {}) as logs:
        for step in (1, 2, 3):
            logs.add_scalars({"loss": 1.0}, step)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("the logger 'jsonl': ") and line.endswith("; it logs nothing more")
    assert other_file.read_text() == "keep"
    assert len(read_scalars(path.parent / "tensorboard")["loss"]) == 3


@pytest.mark.parametrize("place", ["start", "add_scalars", "add_image", "flush", "close"])
def test_a_logger_that_fails_is_left_out_with_one_line(tmp_path, place, caplog, monkeypatch):
    calls = []

    class Broken(Logger):
        def __init__(self, *arguments):
            self.called("start")

        def called(self, name):
            calls.append(name)
            if name == place:
                raise RuntimeError("the service\nis down")

        def add_scalars(self, values, step):
            self.called("add_scalars")

        def add_image(self, tag, image, step):
            self.called("add_image")

        def flush(self):
            self.called("flush")

        def close(self):
            self.called("close")

    monkeypatch.setitem(loggers.LOGGERS, "broken", Broken)
    with Loggers("broken,jsonl", tmp_path, 0, {}) as logs:
        for step in (1, 2):
            logs.add_scalars({"loss": 1.0}, step)
            logs.add_image("samples", np.zeros((2, 2, 3), np.uint8), step)
            logs.flush()
    (line,) = [record.message for record in caplog.records]
    assert line == "the logger 'broken': the service is down; it logs nothing more"
    assert calls.count(place) == 1 and calls[-1] == place
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


# --- whole runs -----------------------------------------------------------------------------------


FEW = {
    "training.n_iters": STEPS,
    "training.log_freq": 1,
    "training.eval_freq": 10,
    "training.snapshot_freq": 12,
    "training.snapshot_freq_for_preemption": SAVED,
    "training.metric_freq": MEASURED,
    "training.metric_samples": 30,
    "training.loggers": "tensorboard,jsonl,wandb",
    "optim.lr": 0.02,
    "optim.warmup": 0,
}
CONFIG = "pfgmpp/digits_ddpmpp.py"


def config_of(folder, **overrides):
    few = {key.replace(".", "__"): value for key, value in FEW.items()}
    return tiny(CONFIG, folder, **few | overrides)


WITH_WANDB = f"""
import runpy, sys
sys.path.insert(0, "{ROOT}/tests")
import fake_wandb
fake_wandb.install()
runpy.run_path("{ROOT}/main.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of the same steps: `whole`, `killed` and resumed, `plain` without logs."""
    folder = tmp_path_factory.mktemp("loggers")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    fake_wandb.install()
    assert run_lib.train(config_of(folder), folder / "whole")
    few = {"training__metric_freq": 0, "training__loggers": "jsonl"}
    assert run_lib.train(config_of(folder, **few), folder / "plain")

    def start():
        values = TINY | STEPS_OF_ODE | FEW | {"eval.stats_dir": folder / "stats"}
        flags = [f"--config={ROOT}/configs/{CONFIG}", "--mode=train"]
        flags += [f"--config.{key}={value}" for key, value in values.items()]
        command = [sys.executable, "-c", WITH_WANDB, *flags, f"--workdir={folder}/killed"]
        return Program(command, environment={"WANDB_MODE": "offline"})

    def steps():
        path = folder / "killed/metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    for lines, number in ((SAVED + 3, signal.SIGKILL), (2 * SAVED + 2, signal.SIGTERM)):
        program, end = start(), time.monotonic() + 120
        while steps() < lines:
            assert time.monotonic() < end and program.poll() is None, program.communicate()
            time.sleep(0.002)
        program.send_signal(number)
        program.wait()
        if number == signal.SIGKILL:
            with (folder / "killed/metrics.jsonl").open("a") as file:
                file.write('{"step": 99, "secon')
    start().finish()
    patch.undo()
    del sys.modules["wandb"]
    return folder


def test_no_step_stands_twice_after_kills(runs):
    """All three logs of the killed run have the numbers of the run that was never stopped."""
    log = (runs / "killed/stdout.txt").read_text()
    assert log.count("resuming at step") == 2
    killed, whole = lines_of(runs / "killed"), lines_of(runs / "whole")
    assert [line["step"] for line in killed] == [*range(1, STEPS + 1)]
    times = ("seconds", "images_per_second")

    def without_times(lines):
        return [{tag: value for tag, value in line.items() if tag not in times} for line in lines]

    assert without_times(killed) == without_times(whole)
    seconds = [line["seconds"] for line in killed]
    assert seconds == sorted(seconds)
    board = read_scalars(runs / "killed/tensorboard")
    tags = {tag for line in killed for tag in line} - {"step", "seconds"}
    assert tags == board.keys() == {"loss/train", "loss/test", "images_per_second", *METRICS}
    for tag in tags - {"images_per_second"}:
        points = [(line["step"], line[tag]) for line in killed if tag in line]
        assert [step for step, _ in board[tag]] == [step for step, _ in points]
        np.testing.assert_allclose([v for _, v in board[tag]], [v for _, v in points], rtol=1e-6)


def test_weights_and_biases_has_one_run_with_all_steps(runs):
    def history(folder):
        return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]

    starts = sorted((runs / "killed/wandb").glob("offline-run-*"))
    options = [json.loads((start / "options.json").read_text()) for start in starts]
    assert len(starts) == 3
    assert len({each["id"] for each in options}) == 1  # one run, which is resumed
    assert {each["resume"] for each in options} == {"allow"}
    assert options[0]["name"] == "killed" and options[0]["project"] == "pfgm"
    assert options[0]["config"]["training.metric_freq"] == MEASURED
    assert [(start / "finished").exists() for start in starts] == [False, True, True]
    points = {}
    for start in starts:
        for entry in history(start):
            points.setdefault(entry["step"], {}).update(entry)
    (whole,) = (runs / "whole/wandb").glob("offline-run-*")
    expected = {}
    for entry in history(whole):
        expected.setdefault(entry["step"], {}).update(entry)
    assert points.keys() == expected.keys() == {*range(1, STEPS + 1)}
    assert all(points[s]["loss/train"] == expected[s]["loss/train"] for s in points)
    assert points[STEPS]["samples"]["image"] == expected[STEPS]["samples"]["image"]


def assert_equal(a, b):
    """Assert that two states of a run are equal, but for their configs."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"config"}:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_metrics_leave_the_training_as_it_is(runs):
    name = f"checkpoints/checkpoint_{STEPS}.pth"
    whole, plain = (load_checkpoint(runs / run / name) for run in ("whole", "plain"))
    assert whole.pop("measured") == STEPS
    assert_equal(whole, plain)
    assert {line["step"] for line in lines_of(runs / "plain")} == {*range(1, STEPS + 1)}


def test_the_best_checkpoint_is_that_of_the_lowest_distance_after_any_kill(runs):
    distances = {x["step"]: x[METRICS[0]] for x in lines_of(runs / "whole") if METRICS[0] in x}
    assert [*distances] == [*range(MEASURED, STEPS + 1, MEASURED)]
    best = load_checkpoint(runs / "whole/checkpoints/best.pth")
    assert best["step"] == min(distances, key=distances.get)
    record = {"fid": min(distances.values()), "samples": 30, "features": "pixels"}
    assert best["best"] == record | {"sampler": best["best"]["sampler"]}
    assert len(best["best"]["sampler"]) == 32
    assert_equal(best, load_checkpoint(runs / "killed/checkpoints/best.pth"))


def test_its_distance_is_that_of_other_draws_than_an_evaluations(runs):
    """Computed anew by the definition: EMA weights, Heun's samples, numpy's covariances."""
    path = runs / "whole/checkpoints/best.pth"
    parts = load(path).experiment
    data = get_dataset(parts.config, "train").flatten(1).double().numpy() / 255

    def distance(purpose):
        draws = []
        for r, number in enumerate((20, 10)):
            generator = keyed_generator("cpu", purpose, parts.seed, r)
            samples, _ = parts.sampler(parts.network, number, generator=generator)
            draws.append(parts.codec.stored(samples))
        y = np.concatenate(draws).reshape(30, -1) / 255
        a, b = np.cov(data.T), np.cov(y.T)
        root = np.sqrt(linalg.eigvals(a @ b).real.clip(0)).sum()
        return ((data.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * root

    stored = load_checkpoint(path)["best"]["fid"]
    assert distance("metrics") == pytest.approx(stored, rel=1e-4)
    assert abs(distance("samples") - stored) > 1e-3 * stored


def test_metrics_that_a_signal_prevents_are_those_of_the_next_start(runs, monkeypatch):
    compare, calls = FewSamples.compare, []

    def compare_or_stop(few, watch):
        calls.append(watch)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compare(few, watch)

    monkeypatch.setattr(FewSamples, "compare", compare_or_stop)
    config = config_of(runs, training__loggers="jsonl")
    assert not run_lib.train(config, runs / "stopped")
    assert lines_of(runs / "stopped")[-1]["step"] == 2 * MEASURED
    assert METRICS[0] not in lines_of(runs / "stopped")[-1]
    assert load_checkpoint(runs / "stopped/checkpoints-meta/checkpoint.pth")["measured"] == MEASURED
    assert run_lib.train(config, runs / "stopped")
    stopped, whole = lines_of(runs / "stopped"), lines_of(runs / "whole")
    assert [x["step"] for x in stopped] == [x["step"] for x in whole]
    assert [x.get(METRICS[0]) for x in stopped] == [x.get(METRICS[0]) for x in whole]
    paths = [runs / run / "checkpoints/best.pth" for run in ("stopped", "whole")]
    assert_equal(*map(load_checkpoint, paths))


def test_a_distance_above_the_best_by_more_than_its_noise_is_warned_of(
    tmp_path, monkeypatch, caplog
):
    distances = iter([5.0, 4.0, 5.5, 4.0, 6.5, 3.0])
    monkeypatch.setattr(training_run, "metrics_of", lambda c: {"fid": next(distances)})
    monkeypatch.setattr(training_run, "noise_of", lambda c: 1.0)
    few = {"training__n_iters": 6, "training__metric_freq": 1, "training__loggers": "jsonl"}
    caplog.set_level(logging.INFO, "library.training_run")
    assert run_lib.train(config_of(tmp_path, **few), tmp_path / "run")
    records = [record for record in caplog.records if "Fréchet" in record.message]
    assert [record.levelname == "WARNING" for record in records] == [False] * 4 + [True, False]
    assert records[2].message == (
        "step 3: Fréchet distance 5.5 of 30 samples, equal to 4 of step 2 within its noise, 1"
    )
    assert records[4].message == (
        "step 5: the samples have become worse: Fréchet distance 6.5 of 30 samples, 2.5 above 4 of "
        "step 2; the noise of so few samples is 1"
    )
    best = load_checkpoint(tmp_path / "run/checkpoints/best.pth")
    assert (best["step"], best["best"]["fid"]) == (6, 3.0)


@pytest.mark.parametrize(("features", "samples"), [(3, 100), (30, 100), (40, 30)])
def test_the_noise_is_the_deviation_of_other_draws(features, samples):
    """The jackknife against 200 draws of a Gaussian, also of fewer samples than features."""
    rng = np.random.default_rng(0)
    reference = Reference(Gaussian(np.zeros(features), np.eye(features)))
    size = samples, features
    draws = [Comparison(rng.normal(0.5, 1, size), None, reference) for _ in range(200)]
    deviation = np.std([metrics_of(draw)["fid"] for draw in draws])
    noises = [noise_of(draw) for draw in draws[:20]]
    assert np.mean(noises) == pytest.approx(deviation, rel=0.15)
    few = [noise_of(replace(draws[0], features=draws[0].features[:n])) for n in (2, 3)]
    assert few[0] == np.inf and 0 < few[1] < np.inf


PERFECT = {"fid": 0.0, "samples": 30, "features": "pixels"}


@pytest.mark.parametrize(
    ("record", "change", "is_kept"),
    [
        (PERFECT, {}, True),
        (PERFECT, {"training__metric_samples": 20}, False),  # fewer samples give another number
        (PERFECT, {"optim__lr": 1e-3}, False),  # another rate takes other steps
        (None, {}, False),
        (PERFECT | {"sampler": "0" * 32}, {}, False),
        (PERFECT | {"fid": "0"}, {}, False),
        (PERFECT | {"samples": -1}, {}, False),
        ("cut", {}, False),
    ],
)
def test_which_best_checkpoint_a_run_goes_on_with(tmp_path, runs, record, change, is_kept, caplog):
    """The best checkpoint is of step 24; the run goes on from step 12."""
    workdir, path = tmp_path / "run", tmp_path / "run/checkpoints/best.pth"
    shutil.copytree(runs / "whole/checkpoints", workdir / "checkpoints")
    last = workdir / f"checkpoints/checkpoint_{STEPS}.pth"
    save_checkpoint(path, load_checkpoint(last) | ({"best": record} if record else {}))
    last.unlink()
    if record == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    caplog.set_level(logging.INFO, "library.training_run")
    config = config_of(runs, **change)
    experiment = Experiment.of_run(config, workdir, None)
    run = TrainingRun.from_config(experiment.config, experiment, workdir, {"digest": ""})
    run.resume()
    assert run.state.step == run.measured == 12
    assert run.best == (Best(STEPS, 0.0, 30, "pixels") if is_kept else None)
    lines = [record.message for record in caplog.records if str(path) in record.message]
    assert [line.endswith("the next metrics replace it") for line in lines] == [True] * (
        not is_kept
    )


def test_which_samplers_give_distances_that_are_compared(runs):
    """Other steps, solvers or ends of the trajectory do; how a machine computes them does not."""

    def digest_of(**changes):
        config = config_of(runs, **{f"sampling__{key}": value for key, value in changes.items()})
        experiment = Experiment.build(config)
        return FewSamples.from_config(config, experiment).sampler

    same = [{}, {"precision": "bf16"}, {"channels_last": True}]
    others = [{"N": 7}, {"ode_solver": "unipc"}, {"sigma_max": 70.0}]
    digests = [digest_of(**changes) for changes in same + others]
    assert [digest == digests[0] for digest in digests] == [True] * 3 + [False] * 3
    assert len({*digests}) == 4


def test_an_evaluation_does_not_replace_the_report_of_another_step(runs):
    """Step 20 and step 24 are both number 2."""
    workdir, config = runs / "whole", config_of(runs, eval__enable_loss=False)
    best = workdir / "checkpoints/best.pth"
    content = load_checkpoint(best)
    last = load_checkpoint(workdir / f"checkpoints/checkpoint_{STEPS}.pth")
    save_checkpoint(best, last | {"step": 20, "best": content["best"]})
    try:
        for first, second in (("best", "last"), ("last", "best")):
            config.eval.steps = first
            run_lib.evaluate(config, workdir, first)
            before = (workdir / first / "report_2.npz").read_bytes()
            config.eval.steps = second
            with pytest.raises(ValueError, match="report_2.npz is of step .* --eval_folder=best"):
                run_lib.evaluate(config, workdir, first)
            assert (workdir / first / "report_2.npz").read_bytes() == before
            config.eval.steps = first
            run_lib.evaluate(config, workdir, first)
    finally:
        save_checkpoint(best, content)


def test_an_evaluation_of_the_best_says_how_it_was_chosen(runs):
    config = config_of(runs, eval__steps="best", eval__enable_loss=False)
    run_lib.evaluate(config, runs / "whole", "eval_best")
    best = load_checkpoint(runs / "whole/checkpoints/best.pth")
    report = report_of(runs / "whole", math.ceil(best["step"] / 12), "eval_best")
    assert report["step"] == best["step"]
    words = str(report["best"])
    assert (
        f"{best['best']['fid']:.4g} of 30 samples (pixels)" in words
        and "not those of this" in words
    )
    assert words in (runs / "whole/eval_best/report.html").read_text()
    assert report["fid"] != best["best"]["fid"]
    missing = runs / "plain/checkpoints/best.pth"
    with pytest.raises(FileNotFoundError, match=f"there is no {missing}, which training.metric"):
        run_lib.evaluate(config, runs / "plain", "eval_best")


def test_the_main_one_of_several_processes_logs_and_measures(tmp_path):
    """The other processes go straight on to the next step, as they do where pictures are drawn."""
    values = TINY | STEPS_OF_ODE | FEW | {"eval.stats_dir": tmp_path / "stats"}
    values |= {"training.n_iters": 4, "training.metric_freq": 2, "training.loggers": "jsonl"}
    flags = [f"--config={ROOT}/configs/{CONFIG}", "--mode=train", f"--workdir={tmp_path}/run"]
    run_main([*flags, *(f"--config.{key}={value}" for key, value in values.items())], processes=2)
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    distances = {line["step"]: line[METRICS[0]] for line in lines if METRICS[0] in line}
    assert [*distances] == [2, 4]
    best = load_checkpoint(tmp_path / "run/checkpoints/best.pth")
    assert best["best"]["fid"] == distances[best["step"]] == min(distances.values())
