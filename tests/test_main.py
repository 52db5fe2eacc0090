"""The program as its users call it: training, evaluation, resuming, and every typing error."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_program, train_state
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_start import MAIN, Program, run_main

import datasets
import run_lib
import sampling
from configs.poisson import digits_ddpmpp
from library.training_run import TrainingRun
from models import create_model, reference_names
from storage.checkpoints import load_checkpoint

DIGITS = ROOT / "configs/poisson/digits_ddpmpp.py"
TINY = [
    "--config.model.nf=8",
    "--config.model.ch_mult=(1,)",
    "--config.training.n_iters=8",
    "--config.training.log_freq=2",
    "--config.training.eval_freq=4",
    "--config.training.snapshot_freq_for_preemption=2",
    "--config.training.picture_freq=1",
    "--config.sampling.ode_solver=forward_euler",
    "--config.sampling.N=3",
    "--config.eval.batch_size=100",
    "--config.eval.num_samples=130",
    "--config.eval.bpd_num_repeats=1",
    "--config.sampling.rtol=1",  # a likelihood in few evaluations
    "--config.sampling.atol=1",
]


def flags(mode, workdir, *overrides, config=DIGITS):
    base = ["--config", str(config), "--mode", mode, "--workdir", str(workdir)]
    base += [f"--config.eval.stats_dir={workdir}/stats"]
    return [*base, *overrides]


def command(*arguments):
    return [*MAIN, *flags(*arguments)]


def call(mode, workdir, *overrides, config=DIGITS, expect=0):
    return run_main(flags(mode, workdir, *overrides, config=config), expect)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir of the tiny run, trained to its end in one go."""
    workdir = tmp_path_factory.mktemp("run")
    run_program(command("train", workdir, *TINY))
    return workdir


def test_training_leaves_what_the_contract_says(trained):
    steps = {p.name for p in (trained / "checkpoints").iterdir()}
    assert steps == {f"checkpoint_{step}.pth" for step in (2, 4, 6, 8)}
    assert load_checkpoint(trained / "checkpoints-meta/checkpoint.pth")["step"] == 8
    with np.load(trained / "samples/iter_8/sample.npz") as file:
        assert file["samples"].shape == (64, 8, 8, 1)
        assert file["samples"].dtype == np.uint8
    assert Image.open(trained / "samples/iter_8/sample.png").size[0] > 64
    assert "step 8: held-out loss" in (trained / "stdout.txt").read_text()

    board = EventAccumulator(str(trained / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/train")] == [2, 4, 6, 8]
    assert [event.step for event in board.Scalars("loss/test")] == [4, 8]
    assert all(np.isfinite(event.value) for event in board.Scalars("loss/train"))
    assert [event.step for event in board.Images("samples")] == [2, 4, 6, 8]


def held_out_loss(experiment, state, images, seed):
    return TrainingRun(experiment, state, Path("none"), {}, {}, seed).held_out_loss(images)


def test_held_out_loss_has_the_same_noise_at_every_step():
    config = digits_ddpmpp.get_config()
    config.model.update(nf=8, ch_mult=(1,))
    run = run_lib.Experiment.build(config)
    state = train_state(config, run.network, run.objective)
    images = datasets.get_dataset(config, "test")
    state.step = 1
    first = held_out_loss(run, state, images, seed=3)
    state.step = 2
    assert held_out_loss(run, state, images, seed=3) == first
    assert held_out_loss(run, state, images, seed=4) != first


def test_held_out_loss_in_parts_is_that_of_the_whole():
    config = digits_ddpmpp.get_config()
    config.model.update(nf=8, ch_mult=(1,))
    images = datasets.get_dataset(config, "test")
    run = run_lib.Experiment.build(config)
    state = train_state(config, run.network, run.objective)
    whole = held_out_loss(run, state, images, seed=3)
    for state.accumulate in (4, 7):  # 7 does not divide the 96 examples
        assert held_out_loss(run, state, images, seed=3) == pytest.approx(whole, rel=1e-5)


def test_a_failed_snapshot_does_not_stop_training(tmp_path, monkeypatch):
    config = digits_ddpmpp.get_config()
    config.training.n_iters = 4
    config.model.update(nf=8, ch_mult=(1,))

    def fail(*arguments, **options):
        raise FloatingPointError("no flow yet")

    monkeypatch.setattr(sampling, "for_snapshots", lambda *arguments: fail)
    run_lib.train(config, tmp_path)
    assert "step 4: no samples drawn: no flow yet" in (tmp_path / "stdout.txt").read_text()
    assert load_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] == 4


def test_ruined_weights_are_not_saved_over_good_ones(tmp_path, monkeypatch):
    config = digits_ddpmpp.get_config()
    config.training.n_iters = 8
    config.training.snapshot_freq_for_preemption = 3
    config.training.snapshot_sampling = False
    config.model.update(nf=8, ch_mult=(1,))
    step = run_lib.train_step

    def step_then_ruin(state, *arguments):
        loss = step(state, *arguments)
        if state.step == 6:
            state.parameters[0].data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(run_lib, "train_step", step_then_ruin)
    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        run_lib.train(config, tmp_path)
    # the newest good one: step 4 has a numbered checkpoint, with which the state is saved too
    assert load_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] == 4
    assert "stopped by FloatingPointError" in (tmp_path / "stdout.txt").read_text()


def test_a_second_start_has_nothing_left_to_do(trained):
    before = (trained / "stdout.txt").read_text()
    call("train", trained, *TINY)
    after = (trained / "stdout.txt").read_text()
    assert after.startswith(before)  # appended, not truncated
    assert "resuming at step 8 of 8" in after[len(before) :]


def test_evaluation_reports_what_was_asked(trained):
    done = run_program(command("eval", trained, *TINY, "--eval_folder=results"))
    folder = trained / "results"
    with np.load(folder / "report_4.npz") as report:
        assert report["step"] == 8
        assert report["nfe"] == 3
        assert report["num_samples"] == 130
        assert str(report["features"]) == "pixels"
        assert all(np.isfinite(report[key]) for key in ("loss", "bpd", "bpd_error", "fid"))
        fid = f"{report['fid']:.6g}"
    assert re.search(rf"Fréchet distance, pixels +{fid}", done.stdout)
    rounds = [np.load(folder / f"ckpt_4/samples_{r}.npz")["samples"] for r in range(2)]
    assert [r.shape for r in rounds] == [(100, 8, 8, 1), (30, 8, 8, 1)]
    statistics = np.load(folder / "ckpt_4/statistics_1.npz")["pool_3"]
    np.testing.assert_allclose(statistics, rounds[1].reshape(30, 64) / 255)
    assert np.isfinite(np.load(folder / "ckpt_4_loss.npz")["loss"])
    parts = [np.load(folder / f"test_ckpt_4_bpd_{i}.npz")["bpd"] for i in range(2)]
    assert [len(part) for part in parts] == [100, 80]  # the whole split, the rest included
    assert Image.open(folder / "ode_images_4.png").size[0] > 300


def test_pictures_without_metrics(trained):
    """Rows of interpolated and of rescaled prior samples; the first samples only."""
    options = [f"--noconfig.eval.enable_{what}" for what in ("loss", "bpd", "sampling")]
    options += [f"--config.eval.{what}" for what in ("enable_interpolate", "enable_rescale")]
    options += ["--config.eval.save_images", "--config.eval.rescale_norms=(20.0, 100.0)"]
    options += ["--config.eval.num_samples=20", "--config.eval.batch_size=12"]
    call("eval", trained, *TINY, *options, "--eval_folder=pictures")
    folder = trained / "pictures"
    for name in ("interpolation", "rescale"):
        width, height = Image.open(folder / f"{name}_4.png").size
        assert (width, height) == (10 * 50 + 2, 8 * 50 + 2)  # 8 rows of 10, each 48 wide, gap 2
    assert Image.open(folder / "ode_images_4.png").size == (252, 202)  # 20 in rows of 5
    assert not list(folder.glob("ckpt_4/*"))


def test_passes_over_the_test_split_have_their_own_noise(trained):
    options = ["--noconfig.eval.enable_sampling", "--config.eval.bpd_num_repeats=2"]
    call("eval", trained, *TINY, *options, "--eval_folder=passes")
    parts = [np.load(trained / f"passes/test_ckpt_4_bpd_{i}.npz")["bpd"] for i in range(4)]
    first, second = np.concatenate(parts[:2]), np.concatenate(parts[2:])
    assert len(first) == len(second) == 180
    assert not np.isin(first, second).any()
    report = np.load(trained / "passes/report_4.npz")
    assert report["bpd"] == pytest.approx((first + second).mean() / 2)


def test_the_published_name_of_the_split_still_works(trained):
    options = ["--noconfig.eval.enable_sampling", "--noconfig.eval.enable_bpd"]
    options += ["--config.eval.bpd_dataset=train", "--eval_folder=train_split"]
    done = call("eval", trained, *TINY, *options)
    assert "Loss (train)" in done.stdout


def test_a_published_checkpoint_evaluates_as_it_is(trained, tmp_path):
    """Equal weights under their published names give an equal loss."""
    saved = load_checkpoint(trained / "checkpoints/checkpoint_8.pth")
    config = digits_ddpmpp.get_config()
    config.model.update(nf=8, ch_mult=(1,))
    names = reference_names(create_model(config))
    saved["model"] = {f"module.{name}": saved["model"][key] for name, key in names.items()}
    saved["optimizer"] = {}  # evaluation has no use for it
    path = tmp_path / "checkpoints/checkpoint_8.pth"
    path.parent.mkdir()
    torch.save(saved, path)
    options = ["--noconfig.eval.enable_sampling", "--noconfig.eval.enable_bpd"]
    for workdir in (trained, tmp_path):
        call("eval", workdir, *TINY, *options, "--eval_folder=published")
    loss, expected = (np.load(w / "published/report_4.npz")["loss"] for w in (trained, tmp_path))
    assert loss == expected


def test_checkpoints_named_by_their_number_are_found(trained, tmp_path):
    """Some published programs write checkpoint_{step // snapshot_freq}.pth."""
    path = tmp_path / "checkpoints/checkpoint_4.pth"
    path.parent.mkdir()
    path.write_bytes((trained / "checkpoints/checkpoint_8.pth").read_bytes())
    options = ["--noconfig.eval.enable_sampling", "--noconfig.eval.enable_bpd"]
    done = call("eval", tmp_path, *TINY, *options)
    assert "EMA weights of step 8" in done.stdout


@pytest.mark.cuda
def test_the_program_runs_on_a_gpu(tmp_path):
    for mode in ("train", "train", "eval"):
        done = call(mode, tmp_path, *TINY, "--config.device=cuda")
    assert "Fréchet distance" in done.stdout


def test_a_killed_run_goes_on_at_its_step(trained, tmp_path):
    """Killed after a checkpoint and started again, the run ends with the same weights."""
    process = Program(command("train", tmp_path, *TINY))
    resume_path = tmp_path / "checkpoints-meta/checkpoint.pth"
    deadline = time.monotonic() + 120
    while not resume_path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    reached = load_checkpoint(resume_path)["step"]
    assert 0 < reached < 8
    call("train", tmp_path, *TINY)
    log = (tmp_path / "stdout.txt").read_text()
    assert f"resuming at step {reached} of 8" in log
    (held_out,) = re.findall("step 8: held-out loss .*", log)
    assert held_out in (trained / "stdout.txt").read_text()
    last = "checkpoints/checkpoint_8.pth"
    weights, expected = (load_checkpoint(w / last)["model"] for w in (tmp_path, trained))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# --- mistakes: one line, a non-zero status, nothing written ---------------------------------------


@pytest.mark.parametrize("options", [[], ["--mode=eval", "--workdir=nowhere"]])
def test_help_imports_nothing_heavy(options):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "main.py"), *options, "--help"],
        capture_output=True,
        text=True,
    )
    assert all(f"--{flag}: " in done.stdout for flag in ("config", "mode", "workdir"))
    assert not re.search(r"\| +(torch|numpy|scipy|tensorflow)$", done.stderr, re.MULTILINE)


MISTAKES = {
    "unknown override": (
        ["--config.training.n_iter=3"],
        'unknown config value training.n_iter. Did you mean "training.n_iters"',
    ),
    "unknown section": (
        ["--config.trainin.n_iters=3"],
        'unknown config value trainin.n_iters. Did you mean "training.n_iters"',
    ),
    "unread": (["--config.sampling.vs=1"], "sampling.vs is a published key that .*: remove it"),
    "wrong type": (["--config.training.n_iters=many"], "config.training.n_iters=many"),
    "mode": (
        ["--mode=trian"],
        "mode=trian: value should be one of <train.data.eval.sample.export>",
    ),
    "flag": (["--workdri=x"], "workdri.*workdir"),
    "argument": (["train"], "unexpected argument 'train'"),
    "data set": (
        ["--config.data.dataset=digit"],
        "data.dataset must be one of 'digits', .* 'digit'",
    ),
    "method": (
        ["--config.training.sde=poison"],
        "training.sde must be one of 'poisson', .* 'poison'",
    ),
    "model": (["--config.model.name=unet"], "model.name must be one of 'ncsnpp', .*'unet'"),
    "sampler": (["--config.sampling.method=pc"], "has no sampling.method='pc': it has no SDE"),
    "solver": (
        ["--config.sampling.ode_solver=rk4"],
        "ode_solver must be one of 'fitted', 'rk45', .*'rk4'",
    ),
    "steps": (["--config.sampling.N=0"], "sampling.N must be a whole number from 1 .*, not 0"),
    "optimizer": (
        ["--config.optim.optimizer=SGD"],
        "optim.optimizer must be one of 'adam', 'muon', 'radam', not 'SGD'",
    ),
    "split": (["--config.eval.dataset=val"], "eval.dataset must be one of 'train', 'test', not"),
    "device": (
        ["--config.device=cud"],
        "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not 'cud'",
    ),
    "number": (
        ["--config.training.batch_size=0"],
        "batch_size must be .* at least 1, not 0",
    ),
    "precision": (
        ["--config.training.precision=fp8"],
        "precision must be .*'auto', not 'fp8'",
    ),
    "parts": (["--config.training.accumulate=7"], "96 images of a step .* into 7 shards"),
    "share": (["--config.model.dropout=2"], "model.dropout must be a number from 0 to 1, not 2"),
    "tuple": (
        ["--config.model.ch_mult=abc"],
        "ch_mult must be a tuple of 1 to 16.*'abc'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path):
    overrides, pattern = MISTAKES[mistake]
    done = call("train", tmp_path / "run", *overrides, expect=2)
    assert re.fullmatch(rf"error: .*{pattern}.*\n", done.stderr)
    assert not (tmp_path / "run").exists()


CHANGED = """from configs.poisson import digits_ddpmpp

def get_config():
    config = digits_ddpmpp.get_config()
    {}
    return config
"""


@pytest.mark.parametrize(
    "content, pattern",
    [
        (None, " does not exist"),
        ("def get_config(:\n", ", line 1: .*syntax"),
        ("import math\n\ndef get_config():\n    return math.nothing\n", ", line 4: .*nothing"),
        ("import nothing_at_all\n", ", line 1: .*nothing_at_all"),
        ("x = 1\n", " defines no get_config"),
        ("def get_config():\n    return 3\n", ".* does not return an ml_collections.ConfigDict"),
        (
            "from ml_collections import ConfigDict as get_config\n",
            " lacks consistency.P_mean; start from configs/default.py",
        ),
        (
            CHANGED.format("config.training.n_iter = 3"),
            ', line 5: unknown config value training.n_iter. Did you mean "training.n_iters"',
        ),
        (
            CHANGED.format("config.update({'model': {'ch_mul': (1,)}})"),
            ', line 5: unknown config value model.ch_mul. Did you mean "model.ch_mult"',
        ),
        (
            "from configs.parts import experiment\n\ndef get_config():\n"
            "    return experiment({'model': {'ch_mul': (1,)}})\n",
            ', line 4: unknown config value model.ch_mul. Did you mean "model.ch_mult"',
        ),
        (
            CHANGED.format("config.trainin.n_iters = 3"),
            ', line 5: unknown config value trainin. Did you mean "training"',
        ),
        (
            CHANGED.format("config.data.channels = 1"),
            ", line 5: data.channels is a published key that nothing reads .*: remove it",
        ),
        (CHANGED.format("config.training.n_iters = 'a'"), ", line 5: TypeError: .*n_iters"),
        (CHANGED.format("config = {}['training']"), ", line 5: KeyError: 'training'"),
        (
            CHANGED.format("config.unlock(); config.training.n_iter = 3"),
            ': unknown config value training.n_iter. Did you mean "training.n_iters"',
        ),
    ],
)
def test_bad_config_files_are_one_line(content, pattern, tmp_path):
    config = tmp_path / "experiment.py"
    if content is not None:
        config.write_text(content)
    done = call("train", tmp_path / "run", config=config, expect=2)
    assert re.fullmatch(rf"error: config file .*experiment\.py{pattern}.*\n", done.stderr)
    assert not (tmp_path / "run").exists()


def test_mistakes_of_shared_parts_name_their_own_line(tmp_path):
    """The last line of the user's own code, here of a copied configs folder's data set."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    path = tmp_path / "configs/parts.py"
    text = path.read_text().replace("config.model.sigma_max", "config.model.sigmamax")
    path.write_text(text)
    script = f"import sys; sys.path[:1] = {[str(tmp_path), str(ROOT)]!r}; "
    script += "from configs import command_line; "
    script += "command_line.parse(['x', '--config', 'configs/poisson/digits_ddpmpp.py'])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    line = text[: text.index("sigmamax")].count("\n") + 1
    expected = rf'error: config file .*parts\.py, line {line}: .*"model.sigma_max"\?\n'
    assert re.fullmatch(expected, done.stderr)


# --- evaluation without --config ------------------------------------------------------------------


def evaluate_stored(workdir, *overrides, expect=0):
    """Evaluation with the config that the workdir carries."""
    arguments = ["--mode=eval", f"--workdir={workdir}", *overrides]
    return run_main(arguments, expect)


def test_evaluation_takes_the_config_of_the_run(trained):
    options = ["--noconfig.eval.enable_sampling", "--noconfig.eval.enable_bpd"]
    call("eval", trained, *TINY, *options, "--eval_folder=given")
    evaluate_stored(trained, *options, "--eval_folder=stored")
    explicit, stored = (np.load(trained / f"{name}/report_4.npz") for name in ("given", "stored"))
    assert explicit["loss"] == stored["loss"]
    done = evaluate_stored(trained, *options, "--config.eval.dataset=train", "--eval_folder=over")
    assert "Loss (train)" in done.stdout


def test_typing_errors_without_a_config_are_one_line(trained, tmp_path):
    for workdir, override, pattern in [
        (tmp_path, "--config.eval.batch_size=100", r"nothing in .* carries .*--config is needed"),
        (trained, "--config.eval.batchsize=100", 'Did you mean "eval.batch_size"'),
        (trained, "--config.eval.batch_size=many", "config.eval.batch_size=many"),
        (trained, "--workdri=x", "workdri.*workdir"),
    ]:
        done = evaluate_stored(workdir, override, expect=2)
        assert re.fullmatch(rf"error: .*{pattern}.*\n", done.stderr)


def test_training_needs_a_config(trained):
    done = run_main(["--mode=train", f"--workdir={trained}"], expect=2)
    assert re.fullmatch("error: --config is needed.*\n", done.stderr)


def test_evaluation_without_checkpoints_says_where_it_looked(tmp_path):
    done = call("eval", tmp_path / "run", *TINY, expect=2)
    assert re.fullmatch(
        r"error: no checkpoint to evaluate: .*run/checkpoints has none\n", done.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, pattern",
    [
        (
            "--config.eval.steps= --config.eval.begin_ckpt=9 --config.eval.end_ckpt=4",
            "eval.begin_ckpt=9 lies after eval.end_ckpt=4",
        ),
        ("--config.eval.steps=2,5", r"eval.steps=2,5: .* has no step 5, but 2, 4, 6, 8"),
        ("--config.eval.rescale_norms=(3.0,)", "eval.rescale_norms must be .* 2 rising numbers"),
        (
            "--config.eval.features=pixel",
            "eval.features must be one of .*'pixels', .* not 'pixel'",
        ),
    ],
)
def test_mistakes_of_evaluation_are_one_line(trained, override, pattern):
    done = call("eval", trained, *TINY, *override.split(), "--eval_folder=mistake", expect=2)
    assert re.fullmatch(rf"error: .*{pattern}.*\n", done.stderr)
    assert not (trained / "mistake").exists()


def test_an_older_evaluation_does_not_mix_with_a_new_one(trained):
    folder = trained / "twice"
    options = ["--noconfig.eval.enable_bpd", "--eval_folder=twice"]
    call("eval", trained, *TINY, *options)
    call("eval", trained, *TINY, *options, "--config.eval.num_samples=50")
    assert [p.name for p in folder.glob("ckpt_4/samples_*")] == ["samples_0.npz"]


def test_what_is_not_a_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "checkpoints/checkpoint_8.pth"
    path.parent.mkdir()
    path.write_bytes(b"something else")
    done = call("eval", tmp_path, *TINY, expect=2)
    assert re.search(r"^error: .*checkpoint_8\.pth is not a checkpoint: .*$", done.stderr, re.M)
    assert list(tmp_path.glob("eval/*")) == []


def test_a_checkpoint_of_another_network_is_one_line(trained, tmp_path):
    done = call("train", trained, *TINY, "--config.model.nf=16", expect=2)
    assert re.fullmatch(r"error: .*does not fit the configured network: .*\n", done.stderr)


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = call("train", tmp_path / "file", *TINY, expect=2)
    assert re.fullmatch(r"error: workdir .*file is a file; name a folder\n", done.stderr)
    done = call("train", tmp_path / "file" / "run", *TINY, expect=2)
    assert re.fullmatch(r"error: .*Not a directory.*file/run.*\n", done.stderr)


@pytest.mark.parametrize(
    "flag", ["--workdir=", "--eval_folder=", "--eval_folder=.", "--eval_folder=checkpoints/x"]
)
def test_folders_that_are_none_or_trainings_own_are_one_line(trained, tmp_path, flag):
    before = sorted(trained.glob("**/*")), sorted(trained.parent.glob("*"))
    done = call("eval", trained, *TINY, flag, expect=2)
    assert re.fullmatch(
        r"error: .*(name a folder|training's own place; name another).*\n", done.stderr
    )
    assert (sorted(trained.glob("**/*")), sorted(trained.parent.glob("*"))) == before


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.4, 1.0, 2.0])
def test_an_interrupt_of_the_start_leaves_no_traceback(tmp_path, seconds):
    start = command("train", tmp_path, *TINY)
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    # the interpreter's own first 20 ms and the import of signal, main.py's first, belong to nobody
    in_main = "main.py" in errors and "import signal" not in errors
    assert "Traceback" not in errors or not in_main
    assert process.returncode in (0, 130, -signal.SIGINT, 1)


# --- restoring alone ------------------------------------------------------------------------------


RESTORE = ["--config.sampling.restore=super2", "--config.sampling.restore_degrade"]


@pytest.mark.parametrize(
    "overrides, evaluated, folder",
    [
        ([], "loss, bpd, sampling", "eval"),
        (RESTORE, "restore super2", "restored"),
        ([*RESTORE, "--noconfig.eval.enable_bpd", "--eval_folder=mine"], "restore super2", "mine"),
        ([*RESTORE, "--config.eval.enable_loss"], "loss, bpd, sampling, restore super2", "eval"),
    ],
)
def test_an_evaluation_asked_to_restore_does_not_sample(trained, overrides, evaluated, folder):
    """Only restoration is evaluated, in its own folder, unless the command line asks for more."""
    output = call("eval", trained, "--dry_run", *overrides).stdout
    parts = ", ".join(
        p if p.startswith("restore") else f"enable_{p}" for p in evaluated.split(", ")
    )
    assert re.search(rf"would evaluate \S+checkpoint_8.pth on \w+: {parts}$", output, re.M)
    assert f"the results would be in {trained / folder}\n" in output
    alone = evaluated == "restore super2"
    assert ("only the restorations are evaluated, into" in output) == alone
