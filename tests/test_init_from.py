"""`training.init_from`: a new run begins with the weights of another model, of any form."""

import logging
import shutil

import numpy as np
import pytest
import snapshot_files as files
import torch
from conftest import train_state
from test_configs import load as experiment
from warm_start import run_main

import models
import run_lib
from configs.edm import digits_ddpmpp as edm_digits
from configs.keys import flatten
from configs.pfgmpp import digits_ddpmpp as pfgmpp_digits
from experiment import load
from library.initial_weights import initialise
from models.published import match_names
from reports.report_file import read_report
from storage import run_config
from storage.checkpoints import load_checkpoint, open_checkpoint, save_checkpoint
from storage.digests import digest
from storage.run_checkpoints import find_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION = {"model.ch_mult": (1, 2), "model.attn_resolutions": (4,)}
FEW = {
    "training.n_iters": 2,
    "training.batch_size": 16,
    "training.small_batch_size": 0,
    "training.snapshot_sampling": False,
    "model.nf": 8,
    "model.ema_rate": 0.5,
    "optim.warmup": 0,
    "optim.cooldown": 0,
    "sampling.ode_solver": "heun",
    "sampling.N": 2,
    "eval.enable_bpd": False,
    "eval.num_samples": 20,
    "eval.batch_size": 20,
}
NUMBERED = {  # noise levels, as the RefineNets take them
    "data.image_size": 16,
    "training.sde": "vesde",
    "training.continuous": False,
    "model.nonlinearity": "elu",
}
STILL = {"optim.lr": 0.0, "training.n_iters": 1}  # a step that moves no weight


def tiny(name="pfgmpp", **changes):
    """A digits experiment of little of everything; `changes` have __ in place of the dot."""
    config = {"pfgmpp": pfgmpp_digits, "edm": edm_digits}[name].get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(FEW | changes)
    return config


def edm_unet(**changes):
    return tiny("edm", **{"model.name": "edm_unet", "model.fir": False} | changes)


def begin_run(config, workdir, source, **changes):
    """Trains a new run from `source`; True where it came to its end."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict({"training.init_from": str(source)} | changes)
    return run_lib.train(config, workdir)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The workdir of a run whose EMA weights are not the weights that it trained."""
    workdir = tmp_path_factory.mktemp("teacher")
    assert run_lib.train(tiny(**ATTENTION), workdir)
    run_lib.export(run_config.load(workdir), workdir)
    return workdir


def newest(workdir):
    return workdir / "checkpoints-meta/checkpoint.pth"


def redrawn(model):
    """The network, none of whose weights is 0 or 1 or that of another seed's."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) / 10)
    return model


def snapshot(path, config, model):
    """The network as a snapshot of EDM."""
    parameters, network = dict(model.named_parameters()), config.model
    weights = {f"model.{n}": parameters[o].data for n, o in models.reference_names(model).items()}
    options = {
        "img_resolution": config.data.image_size,
        "img_channels": config.data.num_channels,
        "label_dim": config.data.num_classes,
        "model_type": "SongUNet",
        "model_channels": network.nf,
        "channel_mult": [*network.ch_mult],
        "num_blocks": network.num_res_blocks,
        "attn_resolutions": [*network.attn_resolutions],
        "dropout": network.dropout,
        "sigma_data": network.sigma_data,
    }
    files.save_pickle(path, files.snapshot(files.published_network(weights, options)))
    return path


def published(path, config, model, averages=None):
    """The network as a checkpoint of score_sde, its names behind `module.`."""
    state = train_state(config, model).state_dict()
    weights = {f"module.{n}": state["model"][o] for n, o in models.reference_names(model).items()}
    ema = state["ema"] | ({} if averages is None else {"shadow_params": averages})
    model = {"module.sigmas": torch.ones(9)} | weights
    save_checkpoint(path, state | {"model": model, "ema": ema, "step": 12_000})
    return path


def outputs(network, config):
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = {"class_labels": torch.tensor([0, 1, -1])} if config.data.num_classes else {}
    with torch.no_grad():
        return network.eval()(x, torch.tensor([0.1, 1.0, 2.0]), **labels)


def line_of(caplog):
    (line,) = (m for m in caplog.messages if m.startswith("initialised from the EMA weights of "))
    return line


# --- what a run begins with -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["", "checkpoints-meta/checkpoint.pth", "checkpoints/checkpoint_1.pth", "model.safetensors"],
)
def test_own_files(teacher, tmp_path, place, caplog):
    caplog.set_level(logging.INFO)
    config = tiny(**ATTENTION | STILL)
    assert begin_run(config, tmp_path, teacher / place)
    old, new = load(teacher / place), load(tmp_path)
    assert torch.equal(new.sample(range(3)), old.sample(range(3)))
    state, start = load_checkpoint(newest(tmp_path)), open_checkpoint(find_checkpoint(teacher)[0])
    trained = [state["model"][n] for n, p in new.experiment.network.named_parameters()]
    assert all(map(torch.equal, trained, state["ema"]["shadow_params"]))  # both from the teacher
    assert (state["step"], state["ema"]["num_updates"]) == (1, 1)
    assert not torch.equal(trained[0], start["model"]["dense1.weight"].load())  # not the raw ones
    entries = len(new.experiment.network.state_dict())
    line = line_of(caplog)
    assert line.endswith(f": {entries} of {entries} tensors copied")
    sha256 = digest(old.experiment.network.state_dict())
    assert f", step {old.step}, digest {sha256[:12]}: " in line
    record = {"path": str(teacher / place), "step": old.step, "digest": sha256}
    assert state["init_from"] == record


@pytest.mark.parametrize("suffix", ["pkl", "pt"])
def test_a_snapshot_of_edm(tmp_path, suffix, caplog):
    caplog.set_level(logging.INFO)
    config = edm_unet(**ATTENTION | STILL)
    model = redrawn(models.create_model(config))
    path = snapshot(tmp_path / f"network-snapshot-000007.{suffix}", config, model)
    assert begin_run(config, tmp_path / "run", path)
    trained = load(tmp_path / "run")
    assert torch.equal(outputs(trained.experiment.network, config), outputs(model, config))
    assert ", step 7, " in line_of(caplog) and line_of(caplog).endswith(" tensors copied")


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_a_checkpoint_of_score_sde(tmp_path, embedding, caplog):
    """Its EMA weights are a list without names, which lacks the Fourier frequencies."""
    caplog.set_level(logging.INFO)
    options = {"model.embedding_type": embedding, "training.sde": "vesde"}
    config = tiny(**ATTENTION | STILL | options)
    model = models.create_model(config)
    averaged = redrawn(models.create_model(config))
    averages = [p.data for p in averaged.parameters() if p.requires_grad]
    if embedding == "fourier":
        averaged.features.W.data = model.features.W.data
    path = published(tmp_path / "checkpoint_12.pth", config, model, averages)
    assert begin_run(config, tmp_path / "run", path)
    network = load(tmp_path / "run").experiment.network
    assert torch.equal(outputs(network, config), outputs(averaged, config))
    assert ", step 12,000, " in line_of(caplog) and line_of(caplog).endswith(" tensors copied")


@pytest.mark.parametrize("case", ["ncsn", "ncsnv2_64", "mlp"])
def test_other_networks(tmp_path, case):
    of_case = {"model.num_res_blocks": 1} if case == "mlp" else NUMBERED
    config = tiny(**{"model.name": case, "model.scale_by_sigma": case == "ncsnv2_64"} | of_case)
    model = redrawn(models.create_model(config))
    path = published(tmp_path / "theirs.pth", config, model)
    network = models.create_model(config)
    initialise(network, str(path))
    assert digest(network.state_dict()) == digest(model.state_dict())


def test_power_function_averages_begin_there(teacher, tmp_path):
    assert begin_run(tiny(**ATTENTION | STILL), tmp_path, teacher, model__ema_stds=(0.05, 0.1))
    state = load_checkpoint(newest(tmp_path))
    for average in state["averages"]:
        assert all(map(torch.equal, average["shadow_params"], state["ema"]["shadow_params"]))
    first = state["averages"][0]["shadow_params"][0]
    assert torch.equal(first, load(teacher).experiment.network.dense1.weight)


# --- what does not fit ----------------------------------------------------------------------------


def test_another_number_of_classes_and_another_d(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    labels = {"data.num_classes": 10, "model.D": 128.0}
    config = edm_unet(**ATTENTION, **{"data.num_classes": 4})
    model = redrawn(models.create_model(config))
    path = snapshot(tmp_path / "a.pkl", config, model)
    config = edm_unet(**ATTENTION | labels | {"training.sde": "pfgmpp"})
    assert begin_run(config, tmp_path / "run", path)
    assert " tensors copied; at their initial values: label_embedding.weight" in line_of(caplog)
    assert line_of(caplog).endswith("label_embedding.weight")
    assert load(tmp_path / "run").experiment.method.D == 128


@pytest.mark.parametrize("form", ["own", "published", "snapshot"])
def test_classes_for_a_network_without(tmp_path, form):
    """A network of score_sde numbers its blocks: one of class labels moves all others."""
    make = edm_unet if form == "snapshot" else tiny
    config, path = make(**ATTENTION), tmp_path / "theirs.pkl"
    model = redrawn(models.create_model(config))
    if form == "snapshot":
        snapshot(path, config, model)
    elif form == "published":
        path = published(tmp_path / "theirs.pth", config, model)
    else:
        path = tmp_path / "theirs.pth"
        save_checkpoint(path, train_state(config, model).state_dict())
    network = models.create_model(make(**ATTENTION, **{"data.num_classes": 10}))
    embedding = {n: w.clone() for n, w in network.state_dict().items() if "label" in n}
    _, line = initialise(network, str(path))
    assert line.endswith("initial values: label_embedding.weight, label_embedding.bias")
    assert network.state_dict().keys() - model.state_dict().keys() == embedding.keys()
    for name, weight in (model.state_dict() | embedding).items():
        assert torch.equal(network.state_dict()[name], weight), name

    back = models.create_model(config)  # from a labelled network to one without
    labelled = make(**ATTENTION, **{"data.num_classes": 10})
    if form == "snapshot":
        snapshot(path, labelled, network)
    elif form == "published":
        published(path, labelled, network)
    else:
        save_checkpoint(path, train_state(labelled, network).state_dict())
    assert initialise(back, str(path))[1].endswith(
        " tensors copied; 2 tensors of the file are not used"
    )
    assert digest(back.state_dict()) == digest(model.state_dict())


@pytest.mark.parametrize("form", ["published", "snapshot"])
@pytest.mark.parametrize(
    "change",
    [
        {"data.image_size": 16},  # no attention at 4 x 4 but in the middle
        {"data.num_channels": 3},
        {"model.num_res_blocks": 2},
        {"model.attn_resolutions": (8, 4)},
    ],
)
def test_published_names_are_paired_like_own_ones(tmp_path, form, change):
    """Published names lead to the weights to which the names of this program's checkpoints do.

    Of more blocks a level, those of a published list may be others of the same shape.
    """
    make = edm_unet if form == "snapshot" else tiny
    config = make(**ATTENTION)
    model = redrawn(models.create_model(config))
    checkpoint, other = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    save_checkpoint(checkpoint, train_state(config, model).state_dict())
    if form == "snapshot":
        other = snapshot(tmp_path / "a.pkl", config, model)
    else:
        published(other, config, model)
    first = models.create_model(make(**ATTENTION | change))
    second = models.create_model(make(**ATTENTION | change))
    second.load_state_dict(first.state_dict())
    lines = [initialise(net, str(path))[1] for net, path in ((first, checkpoint), (second, other))]
    if form == "published" and "model.num_res_blocks" in change:
        assert "initial values: " in lines[1]
    else:
        assert (
            lines[0].partition(" tensors copied")[0][-9:]
            == (lines[1].partition(" tensors copied")[0][-9:])
        )
        assert digest(first.state_dict()) == digest(second.state_dict())


OTHER_FORMS = {
    "classes": {"data.num_classes": 10},
    "size": {"data.image_size": 128},  # attention at 16 x 16 is on another level
    "attention": {"model.attn_resolutions": (16, 8)},
    "channels": {"data.num_channels": 1},
}


@pytest.mark.parametrize("change", OTHER_FORMS)
@pytest.mark.parametrize(
    "path",
    ["vp/cifar10_ddpmpp_continuous.py", "ve/cifar10_ncsnpp.py"]
    + ["edm/cifar10_ncsnpp.py", "edm/ffhq64_ddpmpp.py", "edm/imagenet64_adm.py"]
    + ["edm2/imagenet64_xs.py"],
)
def test_names_of_the_published_networks(path, change):
    """Each weight has the place that it has in the network it was published for."""
    config, changed = experiment(path), experiment(path)
    changed.update_from_flattened_dict(OTHER_FORMS[change])
    with torch.device("meta"):
        old, new = models.create_model(config), models.create_model(changed)
    names, weights = models.reference_names(old), dict(old.named_parameters())
    places = match_names(new, {name: tuple(weights[here].shape) for name, here in names.items()})
    common = {name for name, _ in new.named_parameters()} & weights.keys()
    assert {here: names[places[here]] for here in common} == {here: here for here in common}
    assert {*places.values()} == names.keys() if path.startswith("edm") else places.keys() == common
    assert len(common) > (150 if path.startswith("edm2") else 300)


def test_larger_images_and_a_level_more(teacher, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "large.npz", images=images)
    options = {"data.dataset": "folder", "data.path": str(tmp_path / "large.npz")}
    options |= {"data.image_size": 28, "model.attn_resolutions": (7,), "model.ch_mult": (1, 2, 2)}
    config = tiny(**options | STILL)
    assert begin_run(config, tmp_path / "run", teacher)
    line, old = line_of(caplog), load(teacher).experiment.network.state_dict()
    assert "; at their initial values: " in line and len(line) < 500
    assert "encoder.2 (" in line and " tensors of the file are not used" in line
    new = load(tmp_path / "run").experiment.network.state_dict()
    alike = [name for name in old if name in new and old[name].shape == new[name].shape]
    assert f" {len(alike)} of {len(new)} tensors copied" in line and len(alike) > 40
    assert all(torch.equal(old[name], new[name]) for name in alike)


# --- once -----------------------------------------------------------------------------------------


def test_a_run_resumes_bit_for_bit_without_the_file(teacher, tmp_path, caplog):
    source, whole = tmp_path / "theirs.pth", tmp_path / "whole"
    shutil.copy(newest(teacher), source)
    assert begin_run(tiny(**ATTENTION, **{"training.n_iters": 4}), whole, source)
    source.unlink()
    end = load_checkpoint(newest(whole))
    caplog.set_level(logging.INFO)
    for name in ("", str(source)):
        workdir = tmp_path / f"killed{bool(name)}"
        (workdir / "checkpoints").mkdir(parents=True)
        shutil.copy(whole / "checkpoints/checkpoint_2.pth", workdir / "checkpoints")
        config = tiny(**ATTENTION, **{"training.n_iters": 4, "training.init_from": name})
        assert run_lib.train(config, workdir, dry_run=True)
        assert run_lib.train(config, workdir)
        state = load_checkpoint(newest(workdir))
        for part in ("model", "ema", "optimizer"):
            torch.testing.assert_close(state[part], end[part], rtol=0, atol=0)
        assert state["init_from"] == end["init_from"]
        assert state["config"] == end["config"]
        assert state["config"]["training.init_from"] == str(source)
    assert not any("differs" in m or "init_from" in m for m in caplog.messages)


def test_another_file_is_not_read_by_a_run_that_goes_on(teacher, tmp_path, caplog):
    assert run_lib.train(tiny(**ATTENTION), tmp_path)
    caplog.set_level(logging.INFO)
    line = f"training.init_from={teacher} is not read: the run goes on from {newest(tmp_path)}"
    for dry_run in (True, False):
        config = tiny(**ATTENTION, **{"training.n_iters": 3, "training.init_from": str(teacher)})
        caplog.clear()
        assert run_lib.train(config, tmp_path, dry_run)
        assert caplog.messages.count(line) == 1
    state = load_checkpoint(newest(tmp_path))
    assert "init_from" not in state and state["config"]["training.init_from"] == ""


def test_a_dry_run_says_the_same_and_writes_nothing(teacher, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config, workdir = tiny(**ATTENTION, **{"data.num_classes": 10}), tmp_path / "run"
    config.training.init_from = str(teacher)
    assert run_lib.train(config, workdir, dry_run=True)
    line = line_of(caplog)
    assert "initial values: label_embedding.weight, label_embedding.bias" in line
    assert not workdir.exists()
    caplog.clear()
    assert run_lib.train(config, workdir)
    assert line_of(caplog) == line


def test_two_processes_begin_alike(teacher, tmp_path):
    flags = [f"--config.{key}={value}" for key, value in (FEW | ATTENTION).items()]
    arguments = ["--config", "configs/pfgmpp/digits_ddpmpp.py", "--mode=train", *flags]
    arguments += [f"--workdir={tmp_path}", f"--config.training.init_from={teacher}"]
    output = run_main([*arguments, "--config.optim.lr=0.0"], processes=2).stdout
    assert output.count("initialised from the EMA weights of ") == 1
    assert torch.equal(load(tmp_path).sample([1]), load(teacher).sample([1]))


# --- where the run says it ------------------------------------------------------------------------


def test_the_page_of_an_evaluation_says_it(teacher, tmp_path, caplog):
    workdir = tmp_path / "run"
    assert begin_run(tiny(**ATTENTION), workdir, teacher)
    config = run_config.load(workdir)
    config.update_from_flattened_dict({"training.init_from": "", "eval.stats_dir": str(tmp_path)})
    caplog.set_level(logging.INFO)
    run_lib.evaluate(config, workdir)
    differing = [message for message in caplog.messages if "differs" in message]
    assert len(differing) == 1 and "eval.stats_dir" in differing[0]
    sha256 = digest(load(teacher).experiment.network.state_dict())
    words = f"the weights of {teacher}, step 2, digest {sha256[:12]}"
    (report,) = (workdir / "eval").glob("report_*.npz")
    assert read_report(report)["initial_weights"] == words
    page = (workdir / "eval/report.html").read_text()
    assert "initial weights" in page and words in page


def test_a_strangers_value_is_not_taken_and_none_is_needed(teacher, tmp_path):
    """No mode but training's first start reads it, so that none asks for it."""
    workdir = tmp_path / "run"
    assert begin_run(tiny(**ATTENTION), workdir, teacher)
    assert load_checkpoint(newest(workdir))["config"]["training.init_from"] == str(teacher)
    assert load(workdir).experiment.config.training.init_from == ""
    for mode in ("sample", "export"):
        done = run_main([f"--mode={mode}", f"--workdir={workdir}", "--config.sampling.seeds=0"])
        assert "init_from" not in done.stdout + done.stderr
    assert load(workdir / "model.safetensors").experiment.config.training.init_from == ""


@pytest.mark.parametrize(
    "entry",
    [3, {}, {"path": "a"}, {"path": "a\nb", "step": 1, "digest": "0" * 64}]
    + [{"path": "a", "step": -1, "digest": "0" * 64}, {"path": "a", "step": 1, "digest": "x"}],
)
def test_a_damaged_record_is_one_line(teacher, tmp_path, entry):
    state = load_checkpoint(newest(teacher))
    save_checkpoint(newest(tmp_path), state | {"init_from": entry})
    with pytest.raises(ValueError, match=r"checkpoint.pth: its init_from names no weights: ") as e:
        run_lib.train(tiny(**ATTENTION), tmp_path)
    assert str(e.value).isprintable()


# --- what is refused ------------------------------------------------------------------------------


def refusal(tmp_path, source, **changes):
    """The one line of the error, after which the workdir has no state."""
    with pytest.raises((ValueError, OSError)) as error:
        begin_run(tiny(**ATTENTION | changes), tmp_path / "run", source)
    assert not [*(tmp_path / "run").glob("c*/*"), *(tmp_path / "run").glob("config.json")]
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    return str(error.value)


def test_a_place_without_a_checkpoint_is_one_line(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    assert refusal(tmp_path, missing) == f"no checkpoint and no workdir: {missing} does not exist"
    assert f"no checkpoint in {empty}: " in refusal(tmp_path, empty)


def test_a_damaged_file_is_one_line(teacher, tmp_path):
    for name in ("a.pth", "a.safetensors", "a.pkl"):
        source = teacher / "model.safetensors" if name == "a.safetensors" else newest(teacher)
        content = bytearray(source.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 500] = bytes(500)  # more than a gap between two records
        (tmp_path / name).write_bytes(content)
        line = refusal(tmp_path, tmp_path / name)
        assert line.startswith(f"training.init_from={tmp_path / name}: {tmp_path / name} is n")


def test_a_network_that_nothing_fits_is_one_line(teacher, tmp_path):
    line = refusal(tmp_path, teacher, **{"model.name": "mlp", "model.nf": 9})
    assert line.startswith(f"training.init_from={teacher}: {newest(teacher)} does not fit the ")
    assert line.endswith("weights has a name and shape of the network")


HOSTILE = {
    "no weights": {"model": [1]},
    "a name that is none": {"model": {3: torch.ones(2)}},
    "a word": {"model": {"dense1.weight": "word"}},
    "two of a name": {"model": {"module.x": torch.ones(1), "model.x": torch.ones(1)}},
    "no averages": {"ema": None},
    "too few averages": {"ema": {"shadow_params": [torch.ones(2)]}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_line(teacher, tmp_path, case):
    path = tmp_path / "theirs.pth"
    save_checkpoint(path, load_checkpoint(newest(teacher)) | HOSTILE[case])
    assert refusal(tmp_path, path).startswith(f"training.init_from={path}: {path} does not fit ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_one_line(teacher, tmp_path, value):
    state, path = load_checkpoint(newest(teacher)), tmp_path / "theirs.pth"
    state["ema"]["shadow_params"][0].view(-1)[3] = value
    save_checkpoint(path, state)
    assert "weight 'dense1.weight' is not finite" in refusal(tmp_path, path)


def test_code_in_a_snapshot_is_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    monkeypatch.setattr(files.Persistent, "source", f"open({str(ran)!r}, 'w').close()")
    config = edm_unet(**ATTENTION)
    path = snapshot(tmp_path / "a.pkl", config, redrawn(models.create_model(config)))
    network = models.create_model(config)
    initialise(network, str(path))
    assert not ran.exists()


@pytest.mark.parametrize(
    "names",
    [
        [f"enc.{size}x{size}_block99.norm0.weight" for size in range(1, 60)],
        [f"all_modules.{number}.weight" for number in range(0, 900_000, 3000)],
        ["all_modules.1.", "enc.", "enc.8x8_block0", "dec.8x8_in0.", "."],
    ],
)
def test_strange_names_fit_nothing(tmp_path, names):
    path = tmp_path / "a.pth"
    state = dict.fromkeys(("optimizer", "ema"), {}) | {"step": 1}
    state["model"] = {name: torch.ones(1, 2, 3) for name in names}
    state["ema"] = {"shadow_params": [*state["model"].values()]}
    save_checkpoint(path, state)
    assert "does not fit the configured network: none of its " in refusal(tmp_path, path)


def test_a_network_of_another_scale_is_named(teacher):
    network, values = models.create_model(tiny(**ATTENTION)), flatten(tiny(**ATTENTION))
    assert "sigma" not in initialise(network, str(teacher), values)[1]
    values |= {"model.sigma_data": 0.5, "model.sigma_unit": 1.5}
    assert initialise(network, str(teacher), values)[1].endswith(
        "; its model.sigma_data is 0.75, that of this run 0.5"
        "; its model.sigma_unit is 1.0, that of this run 1.5"
    )
