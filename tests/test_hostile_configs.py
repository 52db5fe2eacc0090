"""Every key of a config with every kind of value: a run that ends as it should, or one line."""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import pictures
from many_lives import small_config

import run_lib
from completion import complete
from configs.default import all_keys, check
from configs.keys import get
from configs.schema import Number
from experiment import Experiment
from reports import page
from sources.batch import Batch
from storage.checkpoints import load_checkpoint
from training import TrainState, train_step

KEYS = all_keys()
VALUES = ["word", "", (), None, True, 2.5, -1, -0.5, 0, 0.0, 1e-200, 10**30]
VALUES += [1e300, math.inf, math.nan]
TINY = {
    "data.dataset": "folder",
    "training.n_iters": 2,
    "training.batch_size": 16,
    "training.snapshot_freq": 2,
    "eval.steps": "",
    "eval.begin_ckpt": 1,
    "eval.end_ckpt": 1,
    "eval.enable_loss": True,
    "eval.enable_bpd": True,
    "eval.enable_sampling": True,
    "eval.bpd_num_repeats": 1,
    "eval.num_samples": 4,
    "eval.batch_size": 4,
    "sampling.N": 2,
    "sampling.rtol": 1.0,
    "sampling.atol": 1.0,
    "sampling.max_evaluations": 100,
    "model.num_scales": 3,
}
OTHERS = {
    "VE": {
        "training.sde": "vesde",
        "sampling.method": "pc",
        "sampling.predictor": "reverse_diffusion",
        "sampling.corrector": "langevin",
    },
    "VP": {"training.sde": "vpsde", "sampling.ode_solver": "heun"},
    "PFGM++": {"training.sde": "pfgmpp", "sampling.ode_solver": "heun"},
    "Poisson": {"training.M": None},  # sigma_end and tau decide it
}
# Keys that need a network of convolutions.
ABOUT_THE_NETWORK = (
    "model.",
    *(f"{s}.{n}" for s in ("training", "sampling") for n in ("compile", "precision")),
    *("training.channels_last", "sampling.channels_last"),
)
# Whole numbers whose largest needs more memory, processes or time than a test has.
SIZES = {
    *("data.image_size", "data.num_classes", "data.num_workers"),
    *("training.batch_size", "training.n_iters"),
    *("model.nf", "model.num_scales", "model.num_res_blocks"),
    *("sampling.N", "sampling.n_steps_each"),
    *("eval.bpd_num_repeats", "eval.num_samples"),
}
ENDS = [
    (key, key_.allowed.kind(end))
    for key, key_ in KEYS.items()
    if isinstance(key_.allowed, Number)
    for end in (key_.allowed.low, key_.allowed.high)
    if not (key in SIZES and end == key_.allowed.high)
]


def method_of(key):
    """The method whose runs read `key`; None for all of them."""
    if key in ("sampling.snr", "sampling.n_steps_each"):
        return "VE"
    return next((name for name in OTHERS if KEYS[key].meaning.startswith(name)), None)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, pictures(40, channels=1))
    return path


def configured(images, workdir, key, value):
    """A tiny run with one value changed; TypeError where the key has another type."""
    config = small_config(**TINY | {"data.path": str(images), "eval.stats_dir": f"{workdir}/stats"})
    if not key.startswith(ABOUT_THE_NETWORK):
        config.model.name = "mlp"  # quick: it has a sixth of the tensors
    config.update_from_flattened_dict(OTHERS.get(method_of(key), {}))
    section, _, name = key.rpartition(".")
    owner = config[section] if section else config
    owner[name] = value
    return config


@pytest.fixture
def without_plots(monkeypatch):
    """Pages without matplotlib's plots, in a quarter of the time; test_report draws any numbers."""
    for name in ("curve_plot", "histogram"):
        monkeypatch.setattr(page, name, lambda *values, **options: "")


def memory(kind: str) -> int:
    """Bytes of this process: resident now (`VmRSS`), or at most since the last reset (`VmHWM`)."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("key", KEYS)
def test_every_kind_of_value_is_run_or_refused_in_one_line(tmp_path, images, key, monkeypatch):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak: earlier tests had their own
    before = memory("VmRSS")
    monkeypatch.chdir(tmp_path)  # eval.stats_dir may be relative
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # Inductor: 30 s
    accepted = set()
    for number, value in enumerate(VALUES):
        workdir = tmp_path / str(number)
        try:
            config = configured(images, workdir, key, value)
            check(config)
        except (TypeError, ValueError) as error:
            assert str(error).isprintable()
            continue
        if repr(get(config, key)) in accepted:  # 0 of a key of real numbers is 0.0
            continue
        accepted.add(repr(get(config, key)))
        try:
            assert run_lib.train(config, workdir)
            run_lib.evaluate(config, workdir)
        except (ValueError, OSError, FloatingPointError) as error:
            assert " ".join(str(error).split())
            continue
        weights = load_checkpoint(workdir / "checkpoints/checkpoint_2.pth")["model"]
        assert all(weight.isfinite().all() for weight in weights.values())
        assert list(workdir.glob("eval/report_*.npz"))
    file_names = {path.name for path in tmp_path.iterdir()}
    assert file_names <= {str(number) for number in range(len(VALUES))} | {"word", "data"}
    assert memory("VmHWM") < before + 2 * 2**30


@pytest.mark.parametrize("key, end", ENDS)
def test_the_ends_of_ranges_are_computed_or_refused_in_one_line(images, key, end):
    """Two steps of training, a density of the prior, samples: all finite, whatever the method."""
    for name in OTHERS if method_of(key) is None else [method_of(key)]:
        config = configured(images, "", key, end)
        config.update_from_flattened_dict(OTHERS[name] | {key: end})
        if get(config, "sampling.method") == "ode":
            config.sampling.ode_solver = "heun"  # takes the given number of steps
        assert KEYS[key].accepts(get(config, key))
        try:
            config, _ = complete(config, Path("none"))
            experiment = Experiment.build(config)
            state = TrainState.from_config(config, experiment.network, experiment.objective)
        except ValueError as error:
            assert " ".join(str(error).split()).isprintable()
            continue
        shape = config.data.num_channels, config.data.image_size, config.data.image_size
        batch = experiment.codec.encode(torch.rand(16, *shape, generator=seeded(0)))
        if config.training.accumulate == 1:
            for _ in range(2):
                loss = train_step(state, Batch(batch), seeded(1))
                assert loss.isfinite()
            assert state.is_finite()
        assert experiment.method.prior_logp(batch).isfinite().all()
        with state.with_ema():
            x = experiment.method.prior_sampling((4, *shape), seeded(2))
            assert x.isfinite().all()
            assert experiment.sampler(state.model, x=x, generator=seeded(3))[0].shape


@pytest.mark.parametrize("key", KEYS)
def test_what_is_refused_is_named(key):
    """Values are named even where a config file turns off the types of ml_collections."""
    config = small_config().copy_and_resolve_references()
    section, _, name = key.rpartition(".")
    for value in VALUES:
        with config.unlocked(), config.ignore_type():
            (config[section] if section else config)[name] = value
        try:
            check(config)
        except ValueError as error:
            assert str(error).startswith(f"{key} must be ")
            assert str(error).isprintable()
        else:
            assert KEYS[key].accepts(get(config, key))  # True may have become 1.0
