"""Every key of a config with every kind of value: a run that ends as it should, or one line."""

import math
import resource

import numpy as np
import pytest
from data_files import pictures
from many_lives import small_config

import run_lib
from configs.default import KEYS, check
from configs.keys import get
from configs.schema import Number
from storage.checkpoints import load_checkpoint

VALUES = ["word", "", (), None, True, 2.5, -1, -0.5, 0, 0.0, 1e-200, 10**30]
VALUES += [1e300, math.inf, math.nan]
TINY = {
    "data.dataset": "folder",
    "training.n_iters": 2,
    "training.batch_size": 16,
    "training.snapshot_freq": 2,
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


def method_of(key):
    """The method whose runs read `key`; None for all of them."""
    if key in ("sampling.snr", "sampling.n_steps_each"):
        return "VE"
    return next((name for name in OTHERS if KEYS[key].meaning.startswith(name)), None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, pictures(40, channels=1))
    return path


def configured(images, workdir, key, value):
    """A tiny run with one value changed; TypeError where the key has another type."""
    config = small_config(
        **TINY | {"data.path": str(images), "eval.stats_dir": str(workdir / "stats")}
    )
    config.update_from_flattened_dict(OTHERS.get(method_of(key), {}))
    section, _, name = key.rpartition(".")
    owner = config[section] if section else config
    owner[name] = value
    return config


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_every_kind_of_value_is_run_or_refused_in_one_line(tmp_path, images, key, monkeypatch):
    monkeypatch.chdir(tmp_path)  # eval.stats_dir may be relative
    for number, value in enumerate(VALUES):
        workdir = tmp_path / str(number)
        try:
            config = configured(images, workdir, key, value)
            check(config)
        except (TypeError, ValueError) as error:
            assert str(error).isprintable()
            continue
        try:
            assert run_lib.train(config, workdir)
            run_lib.evaluate(config, workdir)
        except (ValueError, OSError, FloatingPointError) as error:
            assert " ".join(str(error).split())
            continue
        weights = load_checkpoint(workdir / "checkpoints/checkpoint_2.pth")["model"]
        assert all(weight.isfinite().all() for weight in weights.values())
        assert list(workdir.glob("eval/report_*.npz"))
    written = {path.name for path in tmp_path.iterdir()}
    assert written <= {str(number) for number in range(len(VALUES))} | {"word", "data"}
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20
    )  # KiB; PyTorch has a third


ENDS = [
    (key, end)
    for key, spec in KEYS.items()
    if method_of(key) and isinstance(spec.allowed, Number) and spec.allowed.kind is float
    for end in (spec.allowed.low, spec.allowed.high)
    if spec.accepts(end)
]


@pytest.mark.parametrize("key, value", ENDS)
def test_the_ends_of_a_range_are_run_or_refused_in_one_line(tmp_path, images, key, value):
    try:
        assert run_lib.train(configured(images, tmp_path, key, value), tmp_path)
        run_lib.evaluate(configured(images, tmp_path, key, value), tmp_path)
    except (ValueError, FloatingPointError) as error:
        assert " ".join(str(error).split())
    else:
        assert list(tmp_path.glob("eval/report_*.npz"))


@pytest.mark.parametrize("key", KEYS)
def test_what_is_refused_is_named(key):
    """Also where a config file turns off the types of ml_collections."""
    for value in VALUES:
        config = small_config().copy_and_resolve_references()
        section, _, name = key.rpartition(".")
        with config.unlocked(), config.ignore_type():
            (config[section] if section else config)[name] = value
        try:
            check(config)
        except ValueError as error:
            assert str(error).startswith(f"{key} must be ")
            assert str(error).isprintable()
        else:
            assert KEYS[key].accepts(get(config, key))  # True may have become 1.0
