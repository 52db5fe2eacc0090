"""Flows and EDM's table: each trains, resumes, evaluates, samples, exports and loads."""

import numpy as np
import pytest
import torch
from test_configs import load as load_config

import run_lib
from experiment import load
from storage.checkpoints import load_checkpoint

TINY = {
    "data.num_workers": 0,
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.attn_resolutions": (),
    "training.batch_size": 32,
    "training.snapshot_freq": 10,
    "training.snapshot_freq_for_preemption": 10,
    "training.snapshot_sampling": False,
    "optim.warmup": 0,
    "optim.cooldown": 0,
    "sampling.N": 3,
    "sampling.rtol": 0.5,
    "sampling.atol": 0.5,
    "eval.batch_size": 90,
    "eval.num_samples": 20,
    "eval.bpd_num_repeats": 1,
}
RUNS = {
    "flow": ("flow/digits_ddpmpp.py", {"model.coupling": "transport", "data.num_classes": 10}),
    "trigflow": (
        "trigflow/digits_ddpmpp.py",
        {"model.D": 4.0, "training.target": "posterior_mean"},
    ),
    "edm_vp": ("edm/digits_ddpmpp.py", {"training.sde": "edm_vp", "model.D": 64.0}),
    "edm_ve": ("edm/digits_ddpmpp.py", {"training.sde": "edm_ve"}),
    "iddpm": ("edm/digits_ddpmpp.py", {"training.sde": "iddpm"}),
}


def config_of(name, tmp_path, n_iters):
    path, values = RUNS[name]
    config = load_config(path)
    stats = {"eval.stats_dir": str(tmp_path / "stats"), "training.n_iters": n_iters}
    config.update_from_flattened_dict(TINY | values | stats)
    return config


@pytest.mark.parametrize("name", RUNS)
def test_a_run(name, tmp_path, one_thread):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_lib.train(config_of(name, tmp_path, 20), whole)
    assert run_lib.train(config_of(name, tmp_path, 10), halves)
    assert run_lib.train(config_of(name, tmp_path, 20), halves)
    states = [load_checkpoint(w / "checkpoints/checkpoint_20.pth") for w in (whole, halves)]
    for part in ("model", "ema"):
        torch.testing.assert_close(*(s[part] for s in states), rtol=0, atol=0)

    config = config_of(name, tmp_path, 20)
    run_lib.evaluate(config, whole)
    with np.load(next((whole / "eval").glob("report_*.npz"))) as report:
        assert np.isfinite([report[key] for key in ("fid", "loss", "bpd")]).all()
    run_lib.export(config, whole)
    (shared,) = whole.rglob("*.safetensors")
    trained = [load(path, {"data.dataset": "digits"}) for path in (whole, shared)]
    samples = [t.sample(range(4)) for t in trained]
    assert samples[0].isfinite().all()
    torch.testing.assert_close(*samples, rtol=0, atol=0)
