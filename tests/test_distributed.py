"""Several processes against one: the same gradients, one writer, and a job that survives a kill."""

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from warm_start import Program, run_main

import distributed
import run_lib
from configs.poisson import digits_ddpmpp
from storage.checkpoints import load_checkpoint

DIGITS = ROOT / "configs/poisson/digits_ddpmpp.py"
TINY = [
    "--config.model.nf=8",
    "--config.model.ch_mult=(1,)",
    "--config.training.log_freq=1",
    "--config.training.snapshot_freq_for_preemption=2",
    "--noconfig.training.snapshot_sampling",
    "--config.optim.grad_clip=-1.0",
    "--config.optim.warmup=0",
]


def steps(n):
    return [f"--config.training.n_iters={n}", f"--config.training.snapshot_freq={n}"]


def flags(workdir, *overrides, config=DIGITS, mode="train"):
    base = ["--config", str(config), "--mode", mode, "--workdir", str(workdir)]
    return [*base, *TINY, *overrides]


def launch(workdir, *overrides, options=()):
    """Starts training as two processes of torchrun."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    return subprocess.Popen(
        [sys.executable, *run, str(ROOT / "main.py"), *flags(workdir, *overrides)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, expect=0):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == expect, stdout + stderr
    return stdout, stderr


def first_moments(workdir):
    """Adam's, one vector."""
    saved = load_checkpoint(workdir / "checkpoints-meta/checkpoint.pth")
    return torch.cat([m["exp_avg"].flatten() for m in saved["optimizer"]["state"].values()])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["poisson", "pfgmpp", "vp"])
def test_two_processes_have_the_gradients_of_one(tmp_path, one_thread, method):
    """By the whole program; the charges of the Poisson field are all of the data set."""
    path, begun = ROOT / f"configs/{method}/digits_ddpmpp.py", tmp_path / "begun"
    config = importlib.import_module(f"configs.{method}.digits_ddpmpp").get_config()
    config.model.update(nf=8, ch_mult=(1,))
    config.optim.grad_clip, config.optim.warmup = -1.0, 0
    config.training.update(n_iters=3, snapshot_freq=3, snapshot_sampling=False)
    run_lib.train(config, begun)  # new networks have hardly a gradient
    before, gradients = first_moments(begun), {}
    for name, turns in {"alone": 1, "together": 1, "in turns": 2}.items():
        workdir = tmp_path / name
        if name == "in turns" and method != "poisson":
            continue
        shutil.copytree(begun, workdir)
        if name == "alone":
            config.training.update(n_iters=4, snapshot_freq=4)
            run_lib.train(config, workdir)
        else:
            accumulate = f"--config.training.accumulate={turns}"
            run_main(flags(workdir, *steps(4), accumulate, config=path), processes=2)
        gradients[name] = (first_moments(workdir) - 0.9 * before) / (1 - 0.9)
    truth = gradients.pop("alone")
    assert truth.norm() > 0.1
    for gradient in gradients.values():
        assert (gradient - truth).norm() < 1e-5 * truth.norm()
        assert (gradient - truth).abs().max() < 1e-5 * truth.abs().max()

    log = (tmp_path / "together/stdout.txt").read_text()
    assert len(re.findall("resuming at step 3 of 4: .* 2 processes", log)) == 1  # one writes
    assert len(re.findall("step 4: held-out loss", log)) == 1


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_job_ends_as_it_should(tmp_path):
    run_flags = [*steps(12), "--config.optim.optimizer=Muon"]  # whose products all processes repeat
    run_main(flags(tmp_path / "whole", *run_flags), processes=2)
    job = launch(tmp_path / "killed", *run_flags, options=["--max-restarts=1"])
    resume_path = tmp_path / "killed/checkpoints-meta/checkpoint.pth"
    deadline = time.monotonic() + 120
    while not resume_path.exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process_of_rank(job.pid, 1), signal.SIGKILL)
    finish(job)
    log = (tmp_path / "killed/stdout.txt").read_text()
    (reached,) = {int(step) for step in re.findall(r"resuming at step (\d+) of 12", log)}
    assert 0 < reached < 12
    last = "checkpoints/checkpoint_12.pth"
    ours, theirs = (load_checkpoint(tmp_path / w / last)["model"] for w in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_processes_whose_torchrun_is_killed_save_and_end(tmp_path):
    job = launch(tmp_path, *steps(100_000), "--config.training.eval_freq=1000000")
    resume_path = tmp_path / "checkpoints-meta/checkpoint.pth"
    deadline = time.monotonic() + 120
    while not resume_path.exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [process_of_rank(job.pid, rank) for rank in (0, 1)]
    job.kill()
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, ranks))
    log = (tmp_path / "stdout.txt").read_text()
    (reached,) = re.findall(r"stopped by .+ at step (\d+), which is saved", log)
    assert load_checkpoint(resume_path)["step"] == int(reached)
    job.communicate()


RANK = """
import os, signal, sys, threading, time
import distributed

signal.signal(signal.SIGTERM, signal.SIG_IGN)
distributed.GRACE = 0.5
threading.Thread(target=distributed._end_with, args=[os.getppid()], daemon=True).start()
print(os.getpid(), flush=True)
time.sleep(300)
"""


def test_a_rank_that_does_not_heed_sigterm_ends_with_torchrun():
    """Such a rank is blocked in a collective, where Python's signal handler cannot run."""
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent, RANK], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    ended = not alive(pid)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert ended


def test_a_rank_whose_torchrun_died_before_it_looked_ends_in_one_line():
    """The rank has a new parent, which does not end, but the store of torchrun is gone."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # a port where nobody listens
        environment = {
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(bound.getsockname()[1]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "ended",
        }
        program = "import datetime, distributed\n"
        program += "distributed.START = datetime.timedelta(seconds=1)\n"
        program += "try:\n  with distributed.joined(): pass\n"
        program += "except ConnectionError as error: print(error)\n"
        done = Program([sys.executable, "-c", program], environment=environment).finish()
    assert re.fullmatch("no answer from torchrun at .*\n", done.stdout), done.stderr


def alive(pid: int) -> bool:
    """True if the process is running; a zombie, of which only the exit status remains, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def process_of_rank(parent: int, rank: int) -> int:
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                return int(pid)
    raise ProcessLookupError(f"{parent} has no child of rank {rank}")


@pytest.mark.slow
def test_processes_that_go_apart_are_found_in_the_first_step(tmp_path):
    script = tmp_path / "apart.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import pathlib, torch, distributed, run_lib\n"
        "from configs.poisson import digits_ddpmpp\n"
        "config = digits_ddpmpp.get_config()\n"
        "config.model.nf, config.training.n_iters = 8, 4\n"
        "step = run_lib.train_step\n"
        "def faulty(state, *arguments):\n"
        "    loss = step(state, *arguments)\n"
        "    if distributed.rank() == 1:\n"
        "        state.parameters[3].data[0] += 1e-7  # a bit that flipped\n"
        "    return loss\n"
        "run_lib.train_step = faulty\n"
        "run_lib.train(config, pathlib.Path(sys.argv[1]))\n"
    )
    done = Program([sys.executable, script, tmp_path / "run"], processes=2).finish(expect=1)
    assert "rank 1 has another step or other weights than rank 0 at step 1" in done.stderr
    assert not list((tmp_path / "run/checkpoints-meta").glob("*"))


@pytest.mark.slow
def test_rows_and_means_of_all_processes(tmp_path):
    script = tmp_path / "collect.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, distributed\n"
        "with distributed.joined():\n"
        "    r = distributed.rank()\n"
        "    rows = torch.arange(6, dtype=torch.uint8).view(3, 2) + 6 * r\n"
        "    every = torch.arange(12, dtype=torch.uint8).view(6, 2)\n"
        "    assert torch.equal(distributed.gather(rows), every)\n"
        "    assert distributed.mean(torch.tensor(float(r))) == 0.5\n"
    )
    Program([sys.executable, script], processes=2).finish()


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    """Processes share rounds and batches; one of them reports the numbers of a single process."""
    run_main(flags(tmp_path, *steps(2)))
    options = [f"--config.eval.{what}" for what in ("steps=", "begin_ckpt=1", "end_ckpt=1")]
    options += ["--config.eval.batch_size=50", "--config.eval.num_samples=170"]
    options += ["--config.eval.bpd_num_repeats=1"]
    options += ["--config.sampling.rtol=1", "--config.sampling.atol=1"]
    options += [f"--config.eval.stats_dir={tmp_path / 'stats'}"]
    reports = []
    for processes in (1, 2):
        folder = f"--eval_folder=eval_{processes}"
        evaluation = flags(tmp_path, *steps(2), *options, folder, mode="eval")
        run_main(evaluation, processes=processes)
        with np.load(tmp_path / f"eval_{processes}/report_1.npz") as file:
            reports.append({k: file[k].tolist() for k in file.files if "seconds" not in k})
    assert reports[0] == reports[1]
    assert np.isfinite([reports[0][k] for k in ("fid", "bpd", "loss", "precision")]).all()


def test_a_batch_that_the_processes_do_not_divide_is_one_line(tmp_path, monkeypatch):
    config = digits_ddpmpp.get_config()
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world", lambda: 5)
        with pytest.raises(ValueError, match="the 96 images of a step .* into 5 shards"):
            distributed.check_division(96, accumulate=1)
    config.training.accumulate = 7
    with pytest.raises(ValueError, match="into 7 shards .*training.accumulate=7"):
        run_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_from_disk_train_as_those_in_memory(tmp_path):
    """Two processes, each of which decodes half of a batch and is sent the other half."""
    weights = {}
    for name, limit in (("memory", 2**31), ("disk", 0)):
        options = [f"--config.data.resident_bytes={limit}", "--config.data.num_workers=1"]
        options += [*steps(3), "--config.training.batch_size=192"]
        run_main(flags(tmp_path / name, *options), processes=2)
        path = tmp_path / name / "checkpoints-meta/checkpoint.pth"
        weights[name] = load_checkpoint(path)["model"]
    assert all(torch.equal(w, weights["disk"][name]) for name, w in weights["memory"].items())


def test_alone_everything_is_a_no_op():
    rows = torch.ones(2, 3)
    with distributed.joined():
        assert distributed.is_main()
        assert distributed.mean(rows) is rows
        assert distributed.gather(rows) is rows
        network = torch.nn.Identity()
        assert distributed.averaging_gradients(network) is network
        distributed.check_agreement(0, [rows])


@pytest.mark.slow
def test_labels_of_data_on_disk_reach_every_process(tmp_path):
    """Each process decodes its shard of the batch, and all are given the labels of all of it."""
    options = ["--config.data.num_classes=-1", "--config.data.resident_bytes=0"]
    options += ["--config.data.num_workers=0", "--config.training.batch_size=192"]
    begun = tmp_path / "begun"
    run_main(flags(begun, *steps(3), *options))
    before, gradients = first_moments(begun), []
    for name, processes in (("alone", 1), ("together", 2)):
        shutil.copytree(begun, tmp_path / name)
        run_main(flags(tmp_path / name, *steps(4), *options), processes=processes)
        gradients.append((first_moments(tmp_path / name) - 0.9 * before) / (1 - 0.9))
    alone, together = gradients
    assert alone.norm() > 0.1
    assert (together - alone).norm() < 1e-5 * alone.norm()


WORDS = """
import distributed

with distributed.joined():
    rank = distributed.rank()
    said = [distributed.from_main(lambda: f"{rank}: ä" * 1000), distributed.from_main(str)]
    assert said == ["0: ä" * 1000, ""], said
    distributed.check_same("data", "18 images")
    try:
        distributed.check_same("data", f"{18 + rank} images")
    except ValueError as error:
        assert rank == 1
        print(error)
"""


def test_processes_hear_the_words_of_the_main_one(tmp_path):
    (tmp_path / "words.py").write_text(WORDS)
    done = Program([sys.executable, tmp_path / "words.py"], processes=2).finish()
    assert done.stdout == "rank 1 has other data than rank 0: 19 images, not 18 images\n"
