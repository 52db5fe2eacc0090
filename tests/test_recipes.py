"""Several recipes and seeds from one file: the table, kills, failures."""

import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from scipy import linalg
from test_small_runs import tiny
from warm_start import Program

import run_lib
from benchmarks import recipes
from datasets import get_dataset
from storage.run_checkpoints import peek

FILE = """
folder = "{folder}/out"
seeds = [1, 2]
floor_draws = 20

[columns]
"evaluations" = "nfe .0f"
"Frechet distance" = "fid .4f"
"bits/dim" = "bpd .2f"
"seconds" = "training_seconds .1f"

[overrides]
model = {{ nf = 8, ch_mult = [1], num_res_blocks = 1, attn_resolutions = [] }}
training = {{ n_iters = 2, snapshot_sampling = false, batch_size = 32, small_batch_size = 0 }}
sampling.N = 2

[overrides.eval]
num_samples = 20
batch_size = 20
enable_bpd = false
enable_loss = false
stats_dir = "{folder}/stats"

[[recipes]]
name = "PFGM++, D = 16"
config = "{root}/configs/pfgmpp/digits_ddpmpp.py"
overrides = {{ model.D = 16 }}

[[recipes]]
name = "no such network"
config = "{root}/configs/pfgmpp/digits_ddpmpp.py"
overrides = {{ model.name = "none" }}

[[recipes]]
name = "another evaluation of none"
evaluates = "no such network"

[[recipes]]
name = "3 steps"
evaluates = "PFGM++, D = 16"
overrides = {{ sampling.N = 3 }}

[[recipes]]
name = "further"
config = "{root}/configs/pfgmpp/digits_ddpmpp.py"
starts_from = "PFGM++, D = 16"
overrides = {{ model.D = 4 }}

[[recipes]]
name = "further than none"
config = "{root}/configs/pfgmpp/digits_ddpmpp.py"
starts_from = "no such network"
"""
D16, WRONG, FURTHER = "pfgm++_d_16", "no_such_network", "further"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipes.toml"
    path.write_text(FILE.format(folder=tmp_path, root=ROOT))
    return path


@pytest.fixture
def started(monkeypatch):
    """The programs that recipes start, by mode and workdir; in forks, see warm_start."""
    parts = []

    def start(command, log):
        flags = dict(word.split("=", 1) for word in command[2:])
        parts.append((flags["--mode"], flags["--workdir"].rpartition("/")[2]))
        program = Program(command)
        program.wait()
        for text in program.communicate():
            log.write(text.encode())
        return program

    monkeypatch.setattr(recipes, "start", start)
    return parts


def run(file, monkeypatch, capsys):
    """Exit status and printed lines."""
    monkeypatch.setattr(sys, "argv", ["recipes", str(file)])
    with pytest.raises(SystemExit) as status:
        recipes.main()
    return status.value.code, capsys.readouterr().out.splitlines()


def cells_of(lines, name):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return next(row[1:] for row in rows if row and row[0] == name)


def test_a_table_of_recipes_and_seeds(tmp_path, file, started, monkeypatch, capsys):
    status, lines = run(file, monkeypatch, capsys)
    out = tmp_path / "out"
    assert status == 1  # one recipe is wrong, and the others are done
    expected = [(mode, f"{D16}-s{seed}") for seed in (1, 2) for mode in ("train", "eval")]
    expected += [("train", f"{WRONG}-s{seed}") for seed in (1, 2)]
    expected += [("eval", f"{D16}-s{seed}") for seed in (1, 2)]
    started_further = [
        (mode, f"{FURTHER}-s{seed}") for seed in (1, 2) for mode in ("train", "eval")
    ]
    assert started == expected + started_further
    log = out / "logs" / f"{WRONG}-s2-train.log"
    failure = next(line for line in lines if line.startswith("no such network, seed 2: "))
    assert "model.name must be one of" in failure and failure.endswith(f"(log: {log})")
    assert "another evaluation of none, seed 1: no such network is not trained" in lines
    assert "further than none, seed 1: no such network is not trained" in lines
    for seed in (1, 2):  # each began with the weights of its own seed
        _, content = peek(out / f"{FURTHER}-s{seed}")
        assert content["init_from"]["path"] == str(out / f"{D16}-s{seed}")
    assert str(ROOT / "main.py") in log.read_text().splitlines()[0]

    for name, folder, nfe in (("PFGM++, D = 16", "eval", "3"), ("3 steps", "eval_3_steps", "5")):
        reports = [np.load(out / f"{D16}-s{seed}/{folder}/report_2.npz") for seed in (1, 2)]
        a, b = (float(report["fid"]) for report in reports)
        evaluations, distance, bpd, seconds = cells_of(lines, name)
        assert evaluations == nfe
        assert distance == f"{(a + b) / 2:.4f} ({min(a, b):.4f}-{max(a, b):.4f})"
        assert bpd == ""  # which was not asked for
        assert 0 < float(seconds.split()[0]) < 100
    assert (out / "table.md").read_text().splitlines() == [x for x in lines if x.startswith("|")]
    page = (out / "compare.html").read_text()
    assert "6 runs side by side" in page and "(2 seeds)" in page

    file.write_text(file.read_text().replace("sampling.N = 3", "sampling.N = 4"))
    started.clear()
    seconds = {D16: 5.0, FURTHER: 7.0}  # by the part of a workdir's name before the seed
    monkeypatch.setattr(
        recipes, "seconds_of_training", lambda path, step: seconds[path.parent.name[:-3]]
    )
    _, again = run(file, monkeypatch, capsys)  # what is done is done
    assert started == expected[4:]
    assert cells_of(again, "PFGM++, D = 16")[:3] == cells_of(lines, "PFGM++, D = 16")[:3]
    assert cells_of(again, "PFGM++, D = 16")[3] == "5.0"
    assert cells_of(again, "further")[3] == "12.0"  # with those of the run that it goes on from
    assert cells_of(again, "training images") == cells_of(lines, "training images")
    assert cells_of(again, "3 steps")[0] == "7"

    file.write_text(file.read_text().replace("n_iters = 2", "n_iters = 3"))
    status, lines = run(file, monkeypatch, capsys)
    assert status == "nothing is evaluated, so there is no table"
    changed = [line for line in lines if "training.n_iters was 2 when its training began" in line]
    assert len(changed) == 6
    assert changed[0].endswith(f"remove {out / D16}-s1, or give the recipe another name")


def test_the_floor_and_seconds_are_left_out_where_they_are_not_those_of_the_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(recipes, "floor", lambda *arguments: [1.0])
    columns = {"distance": ("fid", ".1f"), "seconds": ("training_seconds", ".0f")}
    plan = recipes.Plan(tmp_path, [1], columns, [], 20)
    for features, floor in (("pixels,network", ["| training images | 1.0 |  |"]), ("network", [])):
        report = {"features": features, "fid": 2.0, "num_samples": 4, "step": 1}
        runs = {"a": [SimpleNamespace(name="a-s1/eval", report=report)]}
        assert plan.table(runs)[2:] == [*floor, "| a | 2.0 |  |"]


def test_the_floor_is_the_distance_of_training_images(tmp_path):
    """An independent definition, with other draws: their means agree within 5 standard errors."""
    config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path, training__n_iters=1)
    assert run_lib.train(config, tmp_path)
    x = get_dataset(config, "train").flatten(1).double().numpy() / 255
    mean, covariance, rng = x.mean(0), np.cov(x.T), np.random.default_rng(1)

    def distance(y):
        roots = np.sqrt(linalg.eigvals(covariance @ np.cov(y.T)).real.clip(0))
        return (
            ((mean - y.mean(0)) ** 2).sum() + np.trace(covariance + np.cov(y.T)) - 2 * roots.sum()
        )

    theirs = [distance(x[rng.choice(len(x), 200)]) for _ in range(40)]
    ours = recipes.floor(tmp_path, 200, 40)
    error = np.hypot(np.std(theirs), np.std(ours)) / np.sqrt(40)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=5 * error)
    assert error < 0.04 * np.mean(ours)
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.6)


def test_a_kill_costs_no_finished_part(tmp_path, file, started, monkeypatch, capsys):
    text = file.read_text().replace("seeds = [1, 2]", "seeds = [1]").replace("floor_draws = 20", "")
    text = text.replace("n_iters = 2", "n_iters = 100, snapshot_freq_for_preemption = 5")
    file.write_text(text[: text.index('[[recipes]]\nname = "no such')])
    start, workdir = recipes.start, tmp_path / f"out/{D16}-s1"

    def start_and_stop(command, file):
        program = Program(command)
        end = time.monotonic() + 120
        while not (workdir / "checkpoints-meta/checkpoint.pth").exists():
            assert time.monotonic() < end, program.communicate()
            time.sleep(0.02)
        program.send_signal(number)
        program.wait()
        return program

    monkeypatch.setattr(recipes, "start", start_and_stop)
    number = signal.SIGTERM
    status, lines = run(file, monkeypatch, capsys)
    assert status == "nothing is evaluated, so there is no table"
    assert lines[0] == "PFGM++, D = 16, seed 1: its training was stopped; start this program again"
    number = signal.SIGKILL
    _, lines = run(file, monkeypatch, capsys)
    assert lines[0].startswith("PFGM++, D = 16, seed 1: --mode train: killed by SIGKILL (log: ")
    step = peek(workdir)[1]["step"]
    assert 5 <= step < 100

    monkeypatch.setattr(recipes, "start", start)
    assert run(file, monkeypatch, capsys)[0] == 0
    assert f"resuming at step {step} of 100" in (workdir / "stdout.txt").read_text()
    assert started == [("train", f"{D16}-s1"), ("eval", f"{D16}-s1")]
    started.clear()
    assert run(file, monkeypatch, capsys)[0] == 0
    assert started == []


def test_what_is_started_is_asked_to_stop_when_the_program_is_killed(tmp_path):
    child = f"import signal; signal.sigwait([signal.SIGTERM]); open('{tmp_path}/asked', 'w')"
    child = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);" + child
    parent = f"""
import os, sys, time
from benchmarks import recipes
recipes.start([sys.executable, "-c", {child!r}], open("{tmp_path}/log", "wb"))
time.sleep(1)
os.kill(os.getpid(), 9)
"""
    assert Program([sys.executable, "-c", parent], cwd=ROOT).wait(60) == -9
    end = time.monotonic() + 60
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("seeds = [1, 2]", "", "the file has no seeds"),
        ("seeds =", "sedes = 1\nseeds =", "the file has sedes, which is none of folder, seeds"),
        ("config =", "confg =", "has confg, which is none of name, config, evaluates, starts_from"),
        ("fid .4f", "fid", "the column 'Frechet distance' needs an entry and a format"),
        ('"3 steps"', '"PFGM++; D 16"', "two recipes are called 'PFGM++; D 16', or nearly so"),
        ('s = "no such network"', 's = "none"', "evaluates 'none', which is not trained above"),
        ('evaluates = "PFGM++, D = 16"', "", "needs a config, or the name of a recipe"),
        (
            'from = "no such network"',
            'from = "3 steps"',
            "starts_from '3 steps', which is not trained",
        ),
        ("seeds = [1, 2]", "seeds = [1, 2", "Unclosed array"),
    ],
)
def test_a_wrong_file_is_one_line(file, before, after, words, monkeypatch, capsys):
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    monkeypatch.setattr(sys, "argv", ["recipes", str(file)])
    with pytest.raises(SystemExit) as status:
        recipes.main()
    assert status.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "document"), [("digits", "README.md"), ("dimensions", "docs/benchmarks.md")]
)
def test_published_tables_are_those_of_their_files(name, document):
    """Its recipes are the rows of the table, in its order, with the columns of the file."""
    plan = recipes.Plan.read(ROOT / f"benchmarks/{name}.toml")
    section = (ROOT / document).read_text().partition(f"benchmarks/{name}.toml")[2]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = rows[: 3 + len(plan.recipes)]
    assert [row[0] for row in rows[3:]] == [recipe.name for recipe in plan.recipes]
    assert rows[0] == ["method", *plan.columns][: len(rows[0])]
    for recipe in plan.recipes:
        assert (ROOT / recipe.settings["config"]).exists()
