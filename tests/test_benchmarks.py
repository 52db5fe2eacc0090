"""The benchmark of a step: its plain form is the same computation."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["poisson/digits_ncsnpp", "vp/digits_ddpmpp"])
def test_the_plain_form_of_a_step_has_the_same_losses(experiment, tmp_path):
    subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks/train.py",
            f"--config={ROOT}/configs/{experiment}.py",
            "--config.model.nf=8",
            "--config.optim.warmup=0",
            "--config.training.batch_size=96",
            "--config.training.accumulate=2",
            f"--json={tmp_path / 'figures.json'}",
        ],
        check=True,
        timeout=300,
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours, plain = figures["forms"]["ours"], figures["forms"]["plain"]
    assert len(ours["losses"]) == 4
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    for form in (ours, plain):
        assert sum(form["phases"].values()) == pytest.approx(2 * form["phases"]["step"])
        assert form["images_per_second"] > 0
        assert 0 < form["model_flop_utilisation"] < 1
