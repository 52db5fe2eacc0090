"""EDM2 and DiT from end to end: trained, resumed bit for bit, evaluated, shared, trained on."""

import numpy as np
import pytest
import torch
from test_seams import check_equal, in_one_life_and_in_two
from test_small_runs import report_of, tiny
from torch import nn

import run_lib
from experiment import load
from storage.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = {
    "EDM2": ("edm2/digits.py", {"model__head_width": 8, "data__num_classes": -1}),
    "EDM2 and a Student t": ("edm2/digits.py", {"training__sde": "pfgmpp", "model__D": 16.0}),
    "DiT": ("pfgmpp/digits_dit.py", {"model__depth": 2, "model__heads": 2}),
    "DiT of a field": ("pfgmpp/digits_dit.py", {"model__depth": 1, "training__sde": "poisson"}),
}


def config_of(name, tmp_path, **changes):
    path, options = RUNS[name]
    steps = {"n_iters": 20, "snapshot_freq": 20, "snapshot_freq_for_preemption": 10}
    options = {f"training__{key}": value for key, value in steps.items()} | options | changes
    options |= {"training__snapshot_sampling": False, "optim__warmup": 0}
    return tiny(path, tmp_path, **options)


@pytest.mark.parametrize("name", ["EDM2", "DiT"])
def test_a_neighbour_lives_like_every_other_network(name, tmp_path, monkeypatch):
    config = config_of(name, tmp_path)
    one, two = in_one_life_and_in_two(lambda: config_of(name, tmp_path), tmp_path, monkeypatch)
    check_equal(one, two)
    workdir = tmp_path / "one"
    run_lib.evaluate(config, workdir)
    report = report_of(workdir, 1)
    assert np.isfinite([report["fid"], report["loss"]]).all()
    labels = {} if name == "DiT" else {"sampling.class_label": 3}
    samples = load(workdir, labels).sample([1, 2])
    assert samples.isfinite().all() and samples.std() > 0

    run_lib.export(config, workdir, tmp_path)
    shared = tmp_path / "model.safetensors"
    assert torch.equal(load(shared, labels).sample([1, 2]), samples)
    started = config_of(name, tmp_path, training__init_from=str(shared), optim__lr=0.0)
    assert run_lib.train(started, tmp_path / "started")
    old, new = (
        load(place).experiment.network.state_dict() for place in (shared, tmp_path / "started")
    )
    for key, value in old.items():
        if name == "EDM2" and value.ndim > 1:  # training normalises the stored weights
            value, new[key] = (nn.functional.normalize(w.flatten(1)) for w in (value, new[key]))
        torch.testing.assert_close(new[key], value, msg=key)


@pytest.mark.parametrize("name", ["EDM2 and a Student t", "DiT of a field"])
def test_a_neighbour_of_another_method_trains_and_samples(name, tmp_path):
    config = config_of(name, tmp_path, training__n_iters=4)
    assert run_lib.train(config, tmp_path)
    assert load(tmp_path).sample([1]).isfinite().all()


def test_edm2_stores_weights_as_the_optimiser_left_them(tmp_path):
    """EDM2 normalises weights in the next forward pass: checkpoint and EMA are unnormalised."""
    config = config_of("EDM2", tmp_path, model__ema_rate=0.0, model__ema_stds=())
    config.training.n_iters = 3
    assert run_lib.train(config, tmp_path)
    content = load_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")
    stored, size = content["model"]["encoder.0.block0.conv_res0.weight"], 3 * 3 * 8
    norms = stored.flatten(1).norm(dim=1) / size**0.5
    assert ((norms - 1).abs() > 1e-5).all() and ((norms - 1).abs() < 0.1).all()
    trained = [v for k, v in content["model"].items() if not k.startswith("emb_fourier")]
    for average, weight in zip(content["ema"]["shadow_params"], trained, strict=True):
        assert torch.equal(average, weight)


def test_a_shared_file_has_no_uncertainty_to_evaluate(tmp_path):
    config = config_of("EDM2", tmp_path, training__n_iters=2)
    assert run_lib.train(config, tmp_path / "run")
    (tmp_path / "shared/checkpoints").mkdir(parents=True)
    run_lib.export(config, tmp_path / "run", tmp_path / "shared/checkpoints")
    with pytest.raises(ValueError, match="lacks the objective's weights.*enable_loss") as caught:
        run_lib.evaluate(config, tmp_path / "shared")
    assert "\n" not in str(caught.value)
    config.eval.enable_loss = False
    run_lib.evaluate(config, tmp_path / "shared")
