"""The commands of docs/howto.md, run as they stand there; only what they train is smaller."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from warm_start import Program, server

PAGE = (ROOT / "docs/howto.md").read_text()
COMMANDS = dict(re.findall(r"^\*\*(.+?)\.\*\*.*?^```\n(.*?)^```", PAGE, re.M | re.S))
SMALL = (
    "--config.training.n_iters=2 --config.training.batch_size=16 --config.training.M=200 "
    "--config.training.small_batch_size=8 --config.model.nf=8 --config.model.ch_mult='(1,)' "
    "--config.sampling.ode_solver=heun --config.sampling.N=2 --noconfig.eval.enable_bpd "
    "--config.eval.num_samples=40"
)
PYTHON = f"""#!/bin/sh
case "$*" in *"--mode train"*)
    start="$1 $2 $3"; shift 3; set -- $start {SMALL} "$@";;  # main.py --config FILE
esac
case "$1" in
    *.py) exec {shlex.quote(sys.executable)} -S {ROOT}/tests/warm_start.py $WARM_START "$@";;
    *) exec {shlex.quote(sys.executable)} "$@";;
esac
"""
LEFT = {
    "Sweep learning rates": "runs/lr.html",
    "Move a run": "elsewhere/a/checkpoints/checkpoint_2.pth",
    "Share a model": "runs/theirs/samples/step_1/000015.png",
    "Fine-tune another model": "runs/finetuned/checkpoints/checkpoint_2.pth",
    "Change the network": "runs/ddpm/checkpoints/checkpoint_2.pth",
    "Write a config": "runs/mine/checkpoints/checkpoint_2.pth",
    "Change the data": "runs/photos/checkpoints/checkpoint_2.pth",
    "Change the evaluation": "runs/a/eval_more/report.html",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The project's files, a run that is to go on, and photographs of noise."""
    folder = tmp_path_factory.mktemp("howto")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            (folder / path.name).symlink_to(path)
    for name in ("bin", "photos"):
        (folder / name).mkdir()
    python = folder / "bin/python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 20, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(folder / f"photos/{i}.png")
    train = ["--config", "configs/pfgmpp/digits_ddpmpp.py", "--mode", "train"]
    train += ["--workdir", "runs/a", *shlex.split(SMALL), "--config.training.n_iters=1"]
    Program([sys.executable, "main.py", *train], cwd=folder).finish()
    return folder


@pytest.mark.parametrize("title", LEFT)
def test_commands(folder, title):
    assert not (folder / LEFT[title]).exists()
    warm = server().fileno()
    path = f"{folder}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", COMMANDS[title]],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "WARM_START": str(warm)},
        pass_fds=[warm],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / LEFT[title]).exists(), done.stdout


def test_all_commands_are_tested():
    assert COMMANDS.keys() == LEFT.keys() and PAGE.count("```") == 2 * len(COMMANDS)
