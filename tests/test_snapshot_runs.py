"""Snapshots of EDM and PFGM++ in a workdir are evaluated as they are."""

import math
from functools import partial

import numpy as np
import pytest
import snapshot_files as files
import torch
import torch.nn.functional as F
from conftest import train_state
from data_files import pictures, write_tree
from test_edm_networks import CASES, case_inputs, case_weights, close
from warm_start import run_main

import models
from configs.parts import EDM, EDM_DDPMPP, experiment
from experiment import Experiment
from models.layers import Resampling
from models.weights import load_ema
from storage import run_config
from storage.checkpoints import fit, load_checkpoint, save_checkpoint
from storage.edm_configs import complete_config, config_values
from storage.edm_snapshots import Snapshot
from storage.run_checkpoints import (
    checkpoints_of_steps,
    checkpoints_to_evaluate,
    newest_checkpoint,
    snapshots,
)

FEW = [
    "--config.eval.enable_loss",
    "--config.eval.features=pixels",
    "--config.eval.num_samples=20",
    "--config.eval.batch_size=20",
    "--config.sampling.N=2",
    "--config.training.batch_size=8",
]


def place(workdir, case="ddpmpp", name="network-snapshot-000007.pkl", **change):
    """The case's network as a file in checkpoints/, with other options or weights."""
    weights = case_weights(case) | change.pop("weights", {})
    class_name = change.pop("class_name", "EDMPrecond")
    net = files.published_network(weights, CASES[case]["options"] | change, class_name)
    path = workdir / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pkl":
        files.save_pickle(path, files.snapshot(net))
    else:
        files.save_torch(path, {"step": 200_000, "ema": net})
    return path


def evaluate(workdir, *overrides, expect=0):
    arguments = ["--mode=eval", f"--workdir={workdir}", *overrides]
    arguments.append(f"--config.eval.stats_dir={workdir}/stats")
    return run_main(arguments, expect)


def mistake(workdir, *overrides):
    """The one line in which the evaluation ends."""
    line = evaluate(workdir, *overrides, expect=2).stderr
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def report_of(workdir, k):
    with np.load(workdir / f"eval/report_{k}.npz") as file:
        return {name: file[name] for name in file.files}


# --- what is evaluated ----------------------------------------------------------------------------


def loaded(path, config):
    """The experiment of `config` with the weights at `path`, evaluating, and their step."""
    run = Experiment.build(config)
    step = fit(partial(load_ema, run.network.eval()), load_checkpoint(path), path)
    return run, step


def to_evaluate(config, workdir):
    """Checkpoints that an evaluation of the run in `workdir` takes, by number."""
    numbers, training = (config.eval.begin_ckpt, config.eval.end_ckpt), config.training
    if config.eval.steps:
        return checkpoints_of_steps(workdir, config.eval.steps, training.snapshot_freq)
    return checkpoints_to_evaluate(workdir, *numbers, training.snapshot_freq, training.n_iters)


@pytest.mark.parametrize("name", ["network-snapshot-000007.pkl", "training-state-000007.pt"])
@pytest.mark.parametrize("case", CASES)
def test_the_denoiser_is_the_published_one(case, name, tmp_path):
    path, inputs = place(tmp_path, case, name), case_inputs(case)
    config = run_config.load(tmp_path)
    assert to_evaluate(config, tmp_path) == {7: path}
    run, step = loaded(path, config)
    assert step == 7
    labels = {"class_labels": inputs["labels"], "augment_labels": inputs["augment_labels"]}
    with torch.no_grad():
        out = run.method.denoise(run.network, inputs["x"], inputs["sigma"], **labels)
    close(out, inputs["denoised"])


def test_half_precision_becomes_single(tmp_path):
    weights = {name: tensor.half() for name, tensor in case_weights("ddpmpp").items()}
    path = place(tmp_path, weights=weights)
    run, _ = loaded(path, run_config.load(tmp_path))
    names = models.reference_names(run.network)
    state = run.network.state_dict()
    assert len(names) == len(weights)
    for name, tensor in weights.items():
        assert torch.equal(state[names[name.removeprefix("model.")]], tensor.float())


def test_the_program_evaluates_edm_unet(tmp_path):
    """A placed snapshot, and a checkpoint of this program with its weights, report alike."""
    path = place(tmp_path)
    digits = "--config.data.dataset=digits"
    output = evaluate(tmp_path, *FEW, digits).stdout
    assert f"evaluating {path} on cpu" in output
    report = report_of(tmp_path, 7)
    assert report["step"] == 7
    assert report["nfe"] == 3  # Heun, the last step Euler
    assert report["num_samples"] == 20

    config = run_config.load(tmp_path)
    with torch.no_grad():
        model = models.create_model(config)
        models.load_reference_state_dict(model, case_weights("ddpmpp"))
    state = train_state(config, model)
    state.step = 5
    content = state.state_dict() | {"config": run_config.flatten(config)}
    save_checkpoint(tmp_path / "own/checkpoints/checkpoint_5.pth", content)
    evaluate(tmp_path / "own", *FEW, digits, "--config.training.n_iters=5")
    expected = report_of(tmp_path / "own", 1)
    for name in ("loss", "fid", "nearest"):
        assert report[name] == expected[name] != 0


def test_the_program_evaluates_adm_on_data_of_edm(tmp_path):
    place(tmp_path / "run", "adm", "edm-tiny-16x16.pkl")
    write_tree(tmp_path / "data", pictures(30, 16, 16), "00000/img{i:08d}.png")
    (tmp_path / "data/dataset.json").write_text('{"labels": null}')
    evaluate(tmp_path / "run", *FEW, f"--config.data.path={tmp_path / 'data'}")
    report = report_of(tmp_path / "run", 0)
    assert np.isfinite([report["loss"], report["fid"]]).all()
    assert report["num_samples"] == 20


def test_all_snapshots_are_evaluated_but_own_checkpoints_come_first(tmp_path, caplog):
    names = ["network-snapshot-000010.pkl", "network-snapshot-000009.pkl", "final.pt"]
    ten, nine, final = (place(tmp_path, name=name) for name in names)
    assert list(snapshots(tmp_path).items()) == [(0, final), (9, nine), (10, ten)]
    config = run_config.load(tmp_path)
    assert to_evaluate(config, tmp_path) == snapshots(tmp_path)
    assert newest_checkpoint(tmp_path) is None  # training does not go on from them
    checkpoint = tmp_path / f"checkpoints/checkpoint_{config.training.n_iters}.pth"
    save_checkpoint(checkpoint, train_state(config).state_dict())
    with caplog.at_level("INFO"):
        assert to_evaluate(config, tmp_path) == {10: checkpoint}
    assert f"not asked for in {checkpoint.parent}: final.pt, {nine.name}, {ten.name}" in caplog.text


# --- its config -----------------------------------------------------------------------------------


def test_the_config_is_the_recipe_with_the_options_of_the_file():
    def config_of(**options):
        config = complete_config(Snapshot("EDMPrecond", options, {}))
        return run_config.restore(run_config.flatten(config))  # every value is allowed

    common = {"img_channels": 3, "label_dim": 0, "augment_dim": 9, "channel_mult": [2, 2, 2]}
    cifar10 = config_of(img_resolution=32, model_type="SongUNet", **common)
    assert cifar10.data.dataset == "CIFAR10"
    assert (cifar10.training.sde, cifar10.model.D) == ("edm", math.inf)
    assert cifar10.model.ch_mult == (2, 2, 2)
    assert (cifar10.sampling.ode_solver, cifar10.sampling.N) == ("heun", 18)
    faces = config_of(img_resolution=64, model_type="SongUNet", D=128, pfgmpp=True, **common)
    assert (faces.data.dataset, faces.sampling.N) == ("folder", 40)
    assert (faces.training.sde, faces.model.D) == ("pfgmpp", 128)
    imagenet = config_of(img_resolution=64, img_channels=3, label_dim=1000)
    assert (imagenet.model.name, imagenet.data.num_classes) == ("adm", 1000)
    assert not imagenet.data.random_flip


def test_residual_input_without_a_filter():
    """The filter (1, 1) averages four pixels after the convolution, and doubles pixels."""
    options = CASES["ncsnpp"]["options"] | {"resample_filter": [1, 1]}
    values = config_values(Snapshot("EDMPrecond", options, {}))
    config = experiment(EDM, EDM_DDPMPP)
    config.update_from_flattened_dict(values)
    model, x = models.create_model(config), torch.randn(2, 32, 8, 8)
    downs = [m for n, m in model.named_modules() if n.endswith("progressive_input.down")]
    assert len(downs) == 2
    assert all(isinstance(down, Resampling) for down in downs)
    conv = downs[1].fir_conv
    with torch.no_grad():
        expected = F.avg_pool2d(F.conv2d(x, conv.weight, conv.bias, padding=1), 2)
        torch.testing.assert_close(downs[1](x), expected)

    config.model.progressive_input = "none"
    filtered = models.create_model(config)
    config.model.fir = False
    plain, x, label = models.create_model(config), torch.randn(2, 3, 16, 16), torch.zeros(2)
    for name, parameter in filtered.named_parameters():
        parameter.data = torch.randn_like(parameter) / 10
        plain.get_parameter(name).data = parameter.data
    with torch.no_grad():
        torch.testing.assert_close(filtered.eval()(x, label), plain.eval()(x, label))


# --- mistakes -------------------------------------------------------------------------------------


def test_the_program_samples_the_classes_of_the_data(tmp_path):
    """A class-conditional network is given labels; without any one line says what to do."""
    place(tmp_path, "ddpmpp_cond")
    levels = np.repeat(np.arange(5), 4)
    write_tree(tmp_path / "flat", pictures(20))
    for i, image in zip(levels, pictures(20), strict=True):
        write_tree(tmp_path / f"classes/{i}", [image], f"{len(list(tmp_path.rglob('*')))}.png")
    few = [*FEW, "--noconfig.eval.enable_loss", "--config.data.dataset=folder"]
    flat = [*few, f"--config.data.path={tmp_path / 'flat'}"]
    assert "sampling.class_label can name a class instead" in mistake(tmp_path, *flat)
    for flags, allowed in (
        ([*flat, "--config.sampling.class_label=7"], {7}),
        ([*few, f"--config.data.path={tmp_path / 'classes'}"], {0, 1, 2, 3, 4}),
    ):
        evaluate(tmp_path, *flags)
        with np.load(tmp_path / "eval/ckpt_7/samples_0.npz") as file:
            assert set(file["labels"]) == allowed
    guided = [*flat, "--config.sampling.guidance=2"]
    assert "sampling.guidance=2.0 needs a network trained with" in mistake(tmp_path, *guided)
    unknown = [*flat, "--config.sampling.class_label=10"]
    assert "sampling.class_label=10 is no class of the network" in mistake(tmp_path, *unknown)


def test_other_preconditionings_are_named(tmp_path):
    place(tmp_path, class_name="CosinePrecond")
    line = "network-snapshot-000007.pkl: no config for the preconditioning 'CosinePrecond'"
    assert line in mistake(tmp_path)


def test_damaged_files_are_named(tmp_path):
    path = place(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    assert f"error: {path} is no snapshot of EDM or PFGM++: " in mistake(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = place(tmp_path, "ddpmpp_cond")
    write_tree(tmp_path / "data", pictures(20), "{i:03d}/x.png")
    only_loss = ["--config.eval.enable_loss", "--noconfig.eval.enable_sampling"]
    data = [f"--config.data.path={tmp_path / 'data'}", "--config.data.num_classes=20"]
    line = mistake(tmp_path, *only_loss, *data)
    assert f"{path} does not fit the configured network: " in line
    assert "'map_label.weight'" in line
    assert "the run's own config differs: data.num_classes: 10 -> 20, data.path" in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
    weights = {"model.map_layer0.bias": case_weights("ddpmpp")["model.map_layer0.bias"] * value}
    path = place(tmp_path, weights=weights)
    with pytest.raises(ValueError, match="weight 'map_layer0.bias' is not finite"):
        loaded(path, run_config.load(tmp_path))


def test_options_out_of_range_are_named(tmp_path):
    place(tmp_path, num_blocks=10**9)
    assert "model.num_res_blocks must be" in mistake(tmp_path)


def test_two_files_of_one_number(tmp_path):
    place(tmp_path, name="a.pkl")
    place(tmp_path, name="b.pt")
    line = mistake(tmp_path)
    assert "a.pkl and b.pt are both number 0" in line
