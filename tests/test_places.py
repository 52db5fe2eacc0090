"""Places: home folders in paths, names of any bytes, and folders that cannot be written to."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from absl import flags
from conftest import ROOT
from data_files import pictures, write_tree
from many_lives import small_config

import run_lib
from configs import command_line, machine
from configs.default import all_keys, get_default_config
from configs.keys import with_home
from configs.schema import Text
from experiment import load
from library.sample_folder import pair_of
from metrics.reference import Reference, ReferenceStatistics
from reports import report_file
from storage.files import cached
from storage.loggers import Loggers
from storage.workdir import check_writable, evaluation_folder, open_workdir

# --- home folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, path",
    [
        ("~", "/home/me"),
        ("~/runs/a", "/home/me/runs/a"),
        ("~/a.png,~/b.png", "/home/me/a.png,/home/me/b.png"),
        ("~/a.png, ~/b.png", "/home/me/a.png, /home/me/b.png"),
        ("~root/x", f"{os.path.expanduser('~root')}/x"),
        ("./~/x", "./~/x"),
        ("a~/x", "a~/x"),
        ("a,~no-such-user/b", "a,~no-such-user/b"),
        ("/data/~me", "/data/~me"),
        ("", ""),
    ],
)
def test_home_folders(monkeypatch, name, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert with_home("--workdir", name) == path


@pytest.mark.parametrize("name", ["~no-such-user", "~no-such-user/runs", "~no-such-user,~/b"])
def test_a_user_who_does_not_exist_is_one_line(name):
    with pytest.raises(ValueError, match=f"^--outdir={name}: ~no-such-user is no home folder; "):
        with_home("--outdir", name)


PATHS = [name for name, key in all_keys().items() if key.of_machine and name != "data.codec"]


@pytest.mark.parametrize("key", PATHS)
def test_every_key_that_names_a_path_knows_home_folders(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = get_default_config()
    config.update_from_flattened_dict({key: "~/x"})
    machine.expand_home(config)
    section, _, name = key.rpartition(".")
    assert config[section][name] == "/home/me/x"
    config.update_from_flattened_dict({key: "~no-such-user/x"})
    with pytest.raises(ValueError, match=f"^{key}=~no-such-user/x: "):
        machine.expand_home(config)


def test_keys_that_speak_of_files_are_known_as_paths():
    words = ("file", "folder", "path", "checkpoint of")
    texts = {name for name, key in all_keys().items() if type(key.allowed) is Text}
    assert {n for n in texts if any(word in all_keys()[n].meaning for word in words)} <= {*PATHS}


@pytest.mark.parametrize("flag", command_line.PATHS)
def test_every_flag_that_names_a_path_knows_home_folders(flag, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    before = ["main.py", "--mode=train", "--config.data.path=~/x"]
    for argv in ([f"--{flag}=~/x"], [f"-{flag}=~/x"]):
        assert command_line._with_home(before + argv)[-1] == argv[0].replace("~", "/home/me")
    assert command_line._with_home([*before, f"--{flag}", "~/x"])[-1] == "/home/me/x"
    with pytest.raises(ValueError, match=f"^--{flag}=~no-such-user: "):
        command_line._with_home([*before, f"--{flag}=~no-such-user"])


def test_all_flags_of_places_are_known_as_paths():
    import main

    texts = flags.FLAGS.flags_by_module_dict()[main.__name__]
    assert {f.name for f in texts if type(f) is flags.Flag and f.flag_type() == "string"} == {
        *command_line.PATHS
    } - {"config"}


# --- names ----------------------------------------------------------------------------------------


def test_commas_in_the_names_of_two_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a,1.png", "b,2,3.png", "c,d", "d", "c", "d,e", "e"):
        Path(name).touch()
    assert pair_of("a,b") == ["a", "b"]
    assert pair_of("a, b") == ["a", "b"]
    assert pair_of("a,1.png,b") == ["a,1.png", "b"]
    assert pair_of("b,2,3.png,a,1.png") == ["b,2,3.png", "a,1.png"]
    assert pair_of(f"{tmp_path}/a,1.png,{tmp_path}/b") == [f"{tmp_path}/a,1.png", f"{tmp_path}/b"]
    assert pair_of("c,d") == ["c,d"]  # a folder of two, as one without a comma
    assert pair_of("nowhere") == ["nowhere"] and pair_of("x,y") == ["x", "y"]
    with pytest.raises(ValueError, match="must be two images, .*: it is no two files"):
        pair_of("x,y,z")
    with pytest.raises(ValueError, match="must be two images, .*: it is several pairs of files"):
        pair_of("c,d,e")


@pytest.fixture(scope="module")
def run_of_bytes(tmp_path_factory):
    """A workdir and its data, both of names that are no UTF-8, after two steps."""
    place = Path(os.fsdecode(os.fsencode(tmp_path_factory.mktemp("bytes")) + b"/caf\xe9"))
    write_tree(place / "data", pictures(24))
    config = small_config(
        **{
            "data.dataset": "folder",
            "data.path": str(place / "data"),
            "training.n_iters": 2,
            "training.batch_size": 16,
            "sampling.ode_solver": "heun",
            "sampling.N": 3,
            "eval.features": "pixels",
            "eval.num_samples": 8,
            "eval.stats_dir": str(place / "stats"),
            "eval.enable_sampling": True,
            "eval.enable_bpd": False,
        }
    )
    assert run_lib.train(config, place / "run")
    return place, config


def test_names_that_are_no_utf8_train_evaluate_and_are_shown(run_of_bytes, monkeypatch, caplog):
    caplog.set_level(logging.INFO)  # for stdout.txt
    place, config = run_of_bytes
    monkeypatch.setattr(sys, "orig_argv", ["python3", "main.py", f"--workdir={place}/run"])
    run_lib.evaluate(config, place / "run")
    (page,) = (place / "run/eval").glob("report.html")
    assert r"caf\udce9" in page.read_text(encoding="utf-8")
    assert r"caf\udce9" in (place / "run/stdout.txt").read_text(encoding="utf-8")
    (report,) = (place / "run/eval").glob("report_*.npz")
    assert report_file.read_report(report)["step"] == 2


def test_names_that_are_no_utf8_are_sampled_exported_and_loaded(run_of_bytes):
    place, config = run_of_bytes
    run_lib.sample(config, place / "run", place / "samples")
    assert json.loads((place / "samples/settings.json").read_text())
    run_lib.export(config, place / "run", place / "shared")
    assert load(place / "shared/model.safetensors").step == 2


def test_names_that_are_no_utf8_are_compared(run_of_bytes):
    place, _ = run_of_bytes
    command = [sys.executable, "-m", "reports.compare", place / "run", "--out", place / "page.html"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    assert (place / "page.html").read_text(encoding="utf-8")


# --- folders that cannot be written to ------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder read-only, for root too, until the test ends."""
    mounted = []

    def seal(folder):
        for options in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
            try:
                subprocess.run(["mount", *options], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("no file system can be mounted")
            mounted.append(folder) if options[0] == "--bind" else None

    yield seal
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_caches_of_arrays_that_cannot_be_written_are_told_of(tmp_path, read_only, caplog):
    read_only(tmp_path)
    path = tmp_path / "checkpoint_2.fitted.npz"
    for _ in range(2):
        arrays = cached(path, {"a": 1}, lambda: {"x": np.ones(2)}, ("x",), optional=True)
        assert arrays["x"].tolist() == [1, 1]
    lines = lines_of(caplog)
    assert len(lines) == 2 and all("not kept for the next start" in line for line in lines)
    with pytest.raises(OSError, match="Read-only file system: .*fitted.npz"):
        cached(path, {}, lambda: {"x": np.ones(2)}, ("x",))  # results are no cache


def test_a_cache_that_cannot_be_read_is_computed(tmp_path, caplog, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("storage.files.read_arrays", refuse)
    assert cached(tmp_path / "a.npz", {}, lambda: {"x": np.ones(2)}, ("x",))["x"].tolist() == [1, 1]
    assert [line.endswith("it is not used") for line in lines_of(caplog)] == [True]


def test_statistics_that_cannot_be_written_are_measured(tmp_path, read_only, caplog):
    class Pixels:
        def __call__(self, images):
            return images.reshape(len(images), -1).astype(np.float32), None

    read_only(tmp_path)
    data = torch.randint(0, 256, (12, 1, 2, 2), dtype=torch.uint8)
    statistics = ReferenceStatistics(Pixels(), None, data, tmp_path / "new/digits.npz")
    statistics.measure(lambda number: None)
    assert isinstance(statistics.reference, Reference)
    assert statistics.reference.gaussian.mean.shape == (4,)
    (line,) = lines_of(caplog)
    assert line.startswith("the statistics of the data are not kept for the next start")


def test_a_log_and_tensorboard_that_cannot_be_written_are_told_of(tmp_path, read_only, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").mkdir()
    read_only(tmp_path / "run")
    with (
        open_workdir(tmp_path / "run", tmp_path / "out", flag="--outdir"),
        Loggers("tensorboard", tmp_path / "run", 0, {}) as logs,
    ):
        logs.add_scalars({"loss": 1.0}, 1)
        logs.add_image("samples", np.zeros((2, 2, 3), np.uint8), 1)
        logging.getLogger("storage.workdir").warning("goes on")
    log, board, last = lines_of(caplog)
    assert "stdout.txt" in log and log.endswith("the log is on the console only")
    assert "tensorboard" in board and board.endswith("it logs nothing more")
    assert last == "goes on"


def test_results_that_cannot_be_put_anywhere_are_one_line(tmp_path, read_only):
    (tmp_path / "run").mkdir()
    read_only(tmp_path / "run")
    for folder, flag in [("eval", "--eval_folder=/another/folder"), ("a/b/c", "--outdir")]:
        says = rf"^{tmp_path}/run cannot be written to: put the results elsewhere by {flag}$"
        with (
            pytest.raises(PermissionError, match=says),
            open_workdir(tmp_path / "run", tmp_path / "run" / folder, flag=flag),
        ):
            raise AssertionError
    check_writable(tmp_path / "new/folder", "--outdir")
    assert not (tmp_path / "new").exists()


def test_a_lock_that_cannot_lie_beside_its_folder_is_told_of(tmp_path, read_only, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "places/out").mkdir(parents=True)
    read_only(tmp_path / "places")
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "places/out"], check=True)
    try:
        with open_workdir(tmp_path / "run", tmp_path / "places/out"):
            (tmp_path / "places/out/sample").touch()
    finally:
        subprocess.run(["umount", "-l", tmp_path / "places/out"], check=True)
    (line,) = lines_of(caplog)
    assert line.startswith(f"{tmp_path}/places/.out.lock cannot be written; ")


@pytest.mark.usefixtures("few_trajectories")
def test_a_run_that_cannot_be_written_is_evaluated_elsewhere(tmp_path, read_only, caplog):
    workdir, results = tmp_path / "run", tmp_path / "results"
    config = small_config(
        **{
            "training.n_iters": 2,
            "sampling.ode_solver": "fitted",
            "sampling.N": 3,
            "training.snapshot_sampling": False,
            "eval.features": "pixels",
            "eval.num_samples": 70,
            "eval.enable_sampling": True,
            "eval.enable_loss": False,
            "eval.enable_bpd": False,
            "eval.stats_dir": str(workdir / "stats"),
        }
    )
    assert run_lib.train(config, workdir)
    before = sorted(workdir.glob("**/*"))
    read_only(workdir)
    with pytest.raises(PermissionError, match="put the results elsewhere by --eval_folder=/"):
        run_lib.evaluate(config, workdir)
    run_lib.evaluate(config, workdir, str(results))
    assert {path.name for path in results.glob("report*")} >= {"report.html"}
    with pytest.raises(PermissionError, match="put the results elsewhere by --outdir"):
        run_lib.sample(config, workdir)
    with pytest.raises(PermissionError, match="put the results elsewhere by --outdir"):
        run_lib.export(config, workdir)
    with pytest.raises(PermissionError, match="put the results elsewhere by --workdir"):
        run_lib.train(config, workdir)
    assert sorted(workdir.glob("**/*")) == before
    lines = lines_of(caplog)
    for words in ("the log is on the console only", "the statistics of the data are not kept"):
        assert sum(words in line for line in lines) == 1
    assert sum("fitted" in line and "not kept" in line for line in lines) >= 2


def test_evaluation_folders_inside_and_elsewhere(tmp_path):
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    assert evaluation_folder(workdir, "eval") == workdir / "eval"
    assert evaluation_folder(workdir, str(tmp_path / "other")) == tmp_path / "other"
    assert evaluation_folder(workdir, str(workdir / "eval")) == workdir / "eval"
    (workdir / "link").symlink_to(tmp_path / "outside")
    for name in ("..", "../other", "link"):
        with pytest.raises(ValueError, match="lies outside the workdir"):
            evaluation_folder(workdir, name)
    for name in ("checkpoints", str(workdir / "checkpoints"), str(workdir)):
        with pytest.raises(ValueError, match="training's own place"):
            evaluation_folder(workdir, name)
