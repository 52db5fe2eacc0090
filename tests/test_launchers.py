"""Launchers: their variables, jobs that are stopped, killed and resumed, a rank that hangs."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_distributed import alive, flags
from warm_start import MAIN, Program, free_port, run_main

import distributed
from library.signals import stop_signals
from processes import launch
from processes.launch import Launch
from sources import stream
from storage.checkpoints import load_checkpoint

PLAIN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
# as Slurm 23 sets them for a task, and for the script of sbatch
TASK = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[007-008,012],login",
    "SLURM_STEP_NODELIST": "gpu[008,012]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
BATCH = {"SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
# as mpirun of Open MPI 5 sets them
OMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-4711@1",
}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, Launch()),
        (PLAIN, Launch("script", 1, 2, 1, "localhost", 29500)),
        (
            PLAIN | {"TORCHELASTIC_RUN_ID": "7"} | TASK | OMPI,
            Launch("torchrun", 1, 2, 1, "localhost", 29500),
        ),
        ({"WORLD_SIZE": "1"} | TASK, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "7"}, Launch("torchrun")),
        ({"SLURM_NTASKS": "8"}, Launch()),  # the shell of an allocation
        (BATCH | {"SLURM_NTASKS": "1"}, Launch()),
        (TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, Launch()),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, Launch()),
        ({"MASTER_PORT": "29500", "RANK": ""}, Launch()),
        (
            TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "30000"},
            Launch("srun", 9, 16, 1, "10.0.0.1", 30000),
        ),
        (
            TASK | OMPI | {"MASTER_PORT": "30000"},  # mpirun, whose daemons srun started
            Launch("mpirun", 1, 2, 1, "127.0.0.1", 30000),
        ),
    ],
)
def test_launches_that_make_sense(environment, expected):
    assert launch.read(environment) == expected


def test_tasks_agree_on_a_place_to_meet_and_other_jobs_have_another():
    places = set()
    for job, other in ((TASK, "SLURM_JOB_ID"), (TASK, "SLURM_STEP_ID"), (OMPI, "PMIX_NAMESPACE")):
        number = "OMPI_COMM_WORLD_RANK" if job is OMPI else "SLURM_PROCID"
        tasks = [launch.read(job | {number: rank}) for rank in "01"]
        assert [task.rank for task in tasks] == [0, 1]
        assert tasks[0].port == tasks[1].port
        stranger = launch.read(job | {other: "prterun-host-4712@1" if job is OMPI else "2"})
        assert stranger.port != tasks[0].port
        assert {61440 <= task.port < 65536 for task in (*tasks, stranger)} == {True}
        places.add(tasks[0].address)
    assert places == {"gpu008", "127.0.0.1"}


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[12,07-09]", "gpu12"),
        ("rack[3-4]n[0-9]-ib,x", "rack3n0-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list_of_slurm(nodes, first):
    assert launch._first_host(nodes) == first


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"RANK": "1"}, "^RANK=1 without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: "),
        ({"RANK": "0"}, "^RANK=0 without WORLD_SIZE, "),
        ({"WORLD_SIZE": "2"}, "^WORLD_SIZE=2 without RANK, "),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "^RANK=1, WORLD_SIZE=1 without LOCAL_RANK, "),
        (PLAIN | {"MASTER_PORT": ""}, "without MASTER_PORT: "),
        (PLAIN | {"RANK": "2"}, "^RANK=2, WORLD_SIZE=2, .* contradict each other: "),
        (PLAIN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2, .* contradict each other: "),
        (PLAIN | {"RANK": "one"}, "^RANK=one, .* contradict each other: "),
        (PLAIN | {"WORLD_SIZE": "-2"}, "contradict each other: "),
        (PLAIN | {"MASTER_PORT": "70000"}, "contradict each other: "),
        (BATCH, "^SLURM_NTASKS=4, but .* take itself for the only process"),
        (TASK | {"SLURM_PROCID": ""}, "^SLURM_STEP_NUM_TASKS=16, .* without SLURM_PROCID: "),
        (TASK | {"SLURM_PROCID": "16"}, "^SLURM_PROCID=16, .* contradict each other: "),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "^OMPI_COMM_WORLD_SIZE=2, .* without OMPI_COMM_WORLD_RANK"),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, " without MASTER_ADDR: "),  # several hosts
        ({"PMI_SIZE": "16", "PMI_RANK": "3"}, "^PMI_SIZE=16, but "),
    ],
)
def test_launches_that_do_not_say_how_to_start(environment, says):
    with pytest.raises(ValueError, match=says) as raised:
        launch.read(environment)
    assert re.search("start one torchrun on each host, .* set WORLD_SIZE=1$", str(raised.value))
    assert "\n" not in str(raised.value)


def test_a_wrong_launch_ends_every_mode_before_any_work(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK=1 without WORLD_SIZE"), distributed.joined():
        raise AssertionError
    monkeypatch.setenv("RANK", "two")
    assert launch.rank() == 0


@pytest.mark.parametrize("gpus, visible, expected", [(4, None, 1), (4, "0,1,2,3", 1), (1, "3", 0)])
def test_the_gpu_of_a_task(gpus, visible, expected, monkeypatch):
    """With srun --gpus-per-task each task sees one, its own."""
    chosen = []
    cuda = SimpleNamespace(
        device_count=lambda: gpus, set_device=chosen.append, current_device=lambda: chosen[-1]
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in (TASK | {"CUDA_VISIBLE_DEVICES": visible}).items():
        if value:
            monkeypatch.setenv(name, value)
    assert distributed.local_device(torch.device("cuda")) == torch.device("cuda", expected)


# --- the scripts of docs/scaling.md ---------------------------------------------------------------

PAGE = (ROOT / "docs/scaling.md").read_text()
SCRIPTS = dict(re.findall(r"^\*\*(.+?)\.\*\*.*?^```\n(.*?)^```", PAGE, re.M | re.S))
# Launchers that start four tasks here, and a program that prints how it was started.
FAKES = {
    "srun": """
        for i in 0 1 2 3; do
            SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NUM_TASKS=4 SLURM_STEP_ID=0 \\
                SLURM_STEP_NODELIST=localhost "$2" "${@:3}" & ids[i]=$!
        done
        for id in ${ids[@]}; do wait $id || status=$?; done
        exit $status""",
    "mpirun": """
        while [ "$1" != python3 ]; do
            if [ "$1" = -x ]; then export "$2"; fi
            shift
        done
        for i in 0 1 2 3; do
            OMPI_COMM_WORLD_RANK=$i OMPI_COMM_WORLD_LOCAL_RANK=$i OMPI_COMM_WORLD_SIZE=4 \\
                OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_NAMESPACE=a@1 "$@" & ids[i]=$!
        done
        for id in ${ids[@]}; do wait $id || status=$?; done
        exit $status""",
    "torchrun": """
        while [ "$1" != main.py ]; do shift; done
        export WORLD_SIZE=4 MASTER_ADDR=localhost MASTER_PORT=29500 TORCHELASTIC_RUN_ID=1
        for i in 0 1 2 3; do RANK=$i LOCAL_RANK=$i python3 "$@" & done
        wait""",
    "scontrol": 'echo scontrol "$@"',
    "ssh": 'shift; eval "$@"',
    "python3": f"""
        {sys.executable} -S -c 'import os; from processes import launch
        print(launch.read(os.environ))' && echo "$@" >> arguments
        exit $STATUS""".replace("\n        print", "\nprint"),
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("status", [0, 75])
def test_scripts(name, status, tmp_path):
    for program, text in FAKES.items():
        (tmp_path / program).write_text(f"#!/bin/bash\nstatus=0\n{text}\n")
        (tmp_path / program).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", SCRIPTS[name]],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": "77",
            "STATUS": str(status),
        },
        capture_output=True,
        text=True,
    )
    launches = sorted(line for line in done.stdout.splitlines() if line.startswith("Launch("))
    word = {"Plain variables": "script", "Open MPI": "mpirun"}.get(name, name.partition(",")[0])
    assert len(launches) == 4, done.stdout + done.stderr
    for rank, line in enumerate(launches):
        assert f"launcher='{word}', rank={rank}, world=4, local_rank={rank}" in line
    assert len(set(re.findall("address=.*", done.stdout))) == 1
    arguments = {*(tmp_path / "arguments").read_text().splitlines()}
    assert len(arguments) == 1 and arguments.pop().startswith("main.py --config configs/")
    requeued = status == 75 and "requeue" in SCRIPTS[name]
    assert done.stdout.count("scontrol requeue 77") == requeued


# --- jobs -----------------------------------------------------------------------------------------


def tasks(launcher, world):
    """The variables of each task, as the launcher sets them for all on this host."""
    if launcher == "script":
        job = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        jobs = [job | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    elif launcher == "srun":
        job = TASK | {"SLURM_STEP_NUM_TASKS": world, "SLURM_STEP_NODELIST": "localhost"}
        job["SLURM_JOB_ID"] = free_port()
        jobs = [job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(world)]
    else:
        job = OMPI | dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"), world)
        job["PMIX_NAMESPACE"] = free_port()
        names = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
        jobs = [job | dict.fromkeys(names, rank) for rank in range(world)]
    return [{name: str(value) for name, value in variables.items()} for variables in jobs]


STEPS = [f"--config.training.{key}=40" for key in ("n_iters", "snapshot_freq")]
LAST = "checkpoints/checkpoint_40.pth"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights that one process has after the last step, as one vector."""
    workdir = tmp_path_factory.mktemp("alone")
    run_main(flags(workdir, *STEPS))
    return weights(workdir)


def weights(workdir):
    return torch.cat([w.flatten() for w in load_checkpoint(workdir / LAST)["model"].values()])


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def begun(workdir, launcher, world, *options):
    """A job that has saved its first state."""
    job = Program([*MAIN, *flags(workdir, *STEPS, *options)], tasks(launcher, world))
    saved = workdir / "checkpoints-meta/checkpoint.pth"
    wait_for(lambda: saved.exists() or job.poll() is not None)
    return job


def resumed(workdir, launcher, world, step, alone):
    """Goes on with the job, which had saved `step`, and compares its weights."""
    Program([*MAIN, *flags(workdir, *STEPS)], tasks(launcher, world)).finish()
    assert f"resuming at step {step} of 40" in (workdir / "stdout.txt").read_text()
    assert (weights(workdir) - alone).norm() < 1e-4 * alone.norm()


def saved_step(workdir):
    return load_checkpoint(workdir / "checkpoints-meta/checkpoint.pth")["step"]


@pytest.mark.slow
def test_tasks_of_srun_that_are_told_to_stop_save_and_can_be_queued_again(tmp_path, alone):
    job = begun(tmp_path, "srun", 4)
    os.kill(job.pids[2], signal.SIGUSR1)
    output = job.finish(expect=75).stdout
    step = saved_step(tmp_path)
    assert 0 < step < 40
    assert f"at step {step}, which is saved" in output
    assert output.splitlines()[-1] == "to go on: the same srun command"
    resumed(tmp_path, "srun", 4, step, alone)


@pytest.mark.slow
def test_a_killed_process_of_a_script_ends_the_others(tmp_path, alone):
    job = begun(tmp_path, "script", 2)
    os.kill(job.pids[1], signal.SIGKILL)
    errors = job.finish(expect=2).stderr
    assert errors.splitlines()[-1].startswith("error: another process of the job has ended")
    resumed(tmp_path, "script", 2, saved_step(tmp_path), alone)


@pytest.mark.slow
def test_a_stopped_process_of_mpirun_is_named_within_the_limit(tmp_path, alone):
    job = begun(tmp_path, "mpirun", 2, "--config.training.hang_seconds=4")
    os.kill(job.pids[1], signal.SIGSTOP)
    start = time.monotonic()
    wait_for(lambda: not alive(job.pids[0]))
    assert time.monotonic() - start < 4 + 1
    os.kill(job.pids[1], signal.SIGKILL)  # as mpirun does
    (line,) = job.finish(expect=70).stderr.splitlines()[-1:]
    assert re.fullmatch(
        r"error: rank 1 hangs: no process has made progress for training.hang_seconds=4; rank 1 "
        r"gives no sign of life for 2 s; the last thing it did: (its|the) s.*, then it was at "
        r"[\w./]+\.py:\d+, \w+; "
        r"rank 0 is at [\w./]+\.py:\d+, \w+",
        line,
    )
    resumed(tmp_path, "mpirun", 2, saved_step(tmp_path), alone)


WORKER = """
import os, sys, time
import distributed
from processes.watch import did

def stuck(): time.sleep(60)

with distributed.joined(), distributed.watched(2):
    rank, case = distributed.rank(), sys.argv[1]
    distributed.barrier()
    open(f"ready{rank}", "x")
    for step in range(10**6 if case == "stopped" else 10):
        did(f"step {step}")
        if case == "busy" and rank == 0 and step == 5:
            for batch in range(25):
                time.sleep(0.1)
                did(f"batch {batch}")
        if case == "stuck" and rank == 1 and step == 5:
            stuck()
        time.sleep(0.02)
        distributed.barrier()
    if case == "last" and rank == 0: stuck()
"""


@pytest.mark.parametrize("case", ["stopped 0", "stuck", "last", "busy", "suspended"])
def test_what_hangs_and_what_does_not(case, tmp_path):
    (tmp_path / "worker.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WORKER}")
    command = [sys.executable, tmp_path / "worker.py", case.split()[0]]
    job = Program(command, tasks("script", 2), cwd=tmp_path)
    wait_for(lambda: len([*tmp_path.glob("ready*")]) == 2)
    if case == "stopped 0":  # it has the store
        os.kill(job.pids[0], signal.SIGSTOP)
        wait_for(lambda: not alive(job.pids[1]))
        os.kill(job.pids[0], signal.SIGKILL)
        line = job.communicate(60)[1].splitlines()[-1]
        assert "error: rank 0 hangs: " in line and "no sign of life for 1 s; " in line
    elif case == "stuck":
        line = job.finish(expect=70).stderr.splitlines()[-1]
        assert re.search("rank 1 hangs: .* did: step 5, then .*; rank 0 is at dist.* any_of$", line)
    elif case == "last":
        line = job.finish(expect=70).stderr.splitlines()[-1]
        assert re.search("rank 0 hangs: .* did: step 9, then .*; rank 1 is at dist.* any_of$", line)
    else:  # longer than the limit
        if case == "suspended":
            job.send_signal(signal.SIGSTOP)
            time.sleep(2.5)
            job.send_signal(signal.SIGCONT)
        assert "hangs" not in job.finish().stderr


GROUP = """
import os, sys, time, torch, distributed
reader, writer = os.pipe()
if os.fork():  # a script that starts a rank, and ends while it runs
    os.read(reader, 1)
    os._exit(0)
with distributed.joined():
    os.write(writer, b"1")
    time.sleep(2.5)  # a rank of torchrun looks every second
    mean = distributed.mean(torch.tensor(float(distributed.rank()))).item()
    open(sys.argv[1] + str(distributed.rank()), "w").write(str(mean))
"""


def test_ranks_outlive_the_script_that_started_them(tmp_path):
    Program([sys.executable, "-c", GROUP, tmp_path / "mean"], tasks("script", 2)).finish()
    paths = [tmp_path / f"mean{rank}" for rank in (0, 1)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in paths))
    assert [path.read_text() for path in paths] == ["0.5", "0.5"]


def test_slurm_may_ask_to_stop_more_than_once():
    with stop_signals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        assert stop() == "SIGUSR1"


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_processes_of_a_host_share_its_processors(monkeypatch, name):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(24))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert stream.processors() == 24
    monkeypatch.setenv(name, "8")
    assert stream.processors() == 3
    monkeypatch.setenv(name, "48")
    assert stream.processors() == 1
