"""Snapshots in the format of EDM2 are read correctly, and none of their code is run."""

import numpy as np
import pytest
import snapshot_files as files
import torch
from test_edm2 import CASES, case_inputs, case_weights, close
from test_edm_snapshots import mutations
from test_snapshot_runs import FEW, evaluate, loaded, mistake, report_of

from experiment import load
from storage import run_config
from storage.checkpoints import load_checkpoint, snapshot_number
from storage.run_checkpoints import snapshots

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that the source code carried by every module creates."""
    path = tmp_path / "ran"
    monkeypatch.setattr(files.Persistent, "source", f"open({str(path)!r}, 'w').close()")
    return path


def place(workdir, case="cond", name="network-snapshot-0000007-0.100.pkl", half=False, **change):
    """The case's network as a snapshot in checkpoints/, an EMA with what stands beside it."""
    weights = case_weights(case)
    if half:  # as they are published
        weights = {key: tensor.half() for key, tensor in weights.items()}
    net = files.published_network(weights, CASES[case]["options"] | change, "Precond")
    encoder = files.Persistent()
    path = workdir / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save_pickle(path, files.snapshot(net) | {"encoder": encoder})
    return path


@pytest.mark.parametrize("case", ["uncond", "cond"])
def test_the_denoiser_and_its_uncertainty_are_the_published_ones(case, tmp_path, trap):
    path, inputs = place(tmp_path, case), case_inputs(case)
    config = run_config.load(tmp_path)
    assert (config.training.objective, config.model.P_std) == ("uncertainty", 1.6)
    run, step = loaded(path, config)
    assert step == 7 and not trap.exists()
    with torch.no_grad():
        labels = {"class_labels": inputs["labels"]}
        out = run.method.denoise(run.network, inputs["x"], inputs["sigma"], **labels)
        close(out, inputs["denoised"])
        run.load_objective(load_checkpoint(path))
        close(run.objective.eval().log_variance(inputs["sigma"].double()), inputs["logvar"])


def test_half_precision_becomes_single_and_samples(tmp_path, trap):
    path = place(tmp_path, half=True)
    samples = load(path, {"sampling.N": 2, "sampling.class_label": 3}).sample([1, 2])
    assert samples.shape == (2, 3, 16, 16) and samples.isfinite().all()
    assert not trap.exists()


def test_the_program_evaluates_it(tmp_path):
    place(tmp_path, "uncond")
    evaluate(tmp_path, *FEW, "--config.data.dataset=digits")
    report = report_of(tmp_path, 7)
    assert np.isfinite([report["loss"], report["fid"]]).all()
    assert report["nfe"] == 3


def test_averages_of_two_widths_have_one_number(tmp_path):
    place(tmp_path)
    place(tmp_path, name="network-snapshot-0000007-0.050.pkl")
    assert snapshot_number(tmp_path / "network-snapshot-0000007-0.050.pkl") == 7
    with pytest.raises(ValueError, match="are both number 7"):
        snapshots(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"res_balance": 0.5}, "option res_balance other than 0.3"),
        ({"channel_mult_emb": 3}, "option 'channel_mult_emb'"),
        ({"img_channels": 4}, "images of 4 channels: they are latents"),
        ({"num_blocks": "many"}, "options are damaged"),
        ({"num_blocks": 10**9}, "model.num_res_blocks must be"),
    ],
)
def test_options_without_a_config_are_named(change, named, tmp_path):
    place(tmp_path, **change)
    assert named in mistake(tmp_path)


def test_damaged_files_load_or_are_refused_in_one_line(tmp_path, trap):
    path = place(tmp_path, "uncond")
    content, outcomes = path.read_bytes(), {"read": 0, "refused": 0}
    for damaged in mutations(content, 100):
        path.write_bytes(damaged)
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        for tensor in checkpoint["model"].values():
            assert type(tensor) is torch.Tensor
    assert min(outcomes.values()) > 5
    assert not trap.exists()
