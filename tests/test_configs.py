"""The experiments' configs against the published hyper-parameters, and how they are loaded."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
from warm_start import Program

import methods
import models
import sampling
from configs.default import all_keys, check, get_default_config
from configs.keys import explain_unknown, flatten
from configs.published import UNREAD
from configs.table import page

KEYS = all_keys()

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads((ROOT / "tests/golden/configs.json").read_text())

# Values that a published file meant, but lost by a misspelt key: training.continuouse.
DEFECTS = {"ve/ncsnv2/bedroom.py": {"training.continuous": False}}

DIGITS = [f"{name}/digits_ddpmpp.py" for name in ("edm", "pfgmpp", "poisson", "subvp", "vp")]
DIGITS += [f"{method}/digits_demo.py" for method in ("pfgmpp", "poisson", "vp")]
DIGITS += ["poisson/digits_ncsnpp.py", "ve/digits_ncsnpp.py"]
IMAGES = [f"{name}/images{n}_ddpmpp.py" for name in ("pfgmpp", "poisson", "vp") for n in (32, 64)]
IMAGES += ["pfgmpp/images16_ddpmpp.py", "pfgmpp/images16_consistency.py"]
IMAGES += ["pfgmpp/denoise_ddpmpp.py"]
FAMILY = [
    f"{method}/{name}.py"
    for method in ("edm", "pfgmpp")
    for name in ("cifar10_ddpmpp", "cifar10_ncsnpp", "ffhq64_ddpmpp")
]
FAMILY += ["edm/imagenet64_adm.py"]
NEIGHBOURS = ["edm2/digits.py", "pfgmpp/digits_dit.py"]
NEIGHBOURS += [f"edm2/imagenet64_{size}.py" for size in ("xs", "s", "m", "l")]
TOYS = [f"{method}/toy_mlp.py" for method in ("pfgmpp", "poisson", "vp")]
CONSISTENCY = [
    f"{method}/{name}_consistency.py"
    for method in ("edm", "pfgmpp")
    for name in ("cifar10", "digits")
]
FLOWS = [f"flow/{name}.py" for name in ("digits_ddpmpp", "digits_demo", "digits_dit", "toy_mlp")]
FLOWS += ["trigflow/digits_ddpmpp.py"]
EDM_TABLE_ONE = ["edm/cifar10_ddpmpp_vp.py", "edm/cifar10_ncsnpp_ve.py"]
EXPERIMENTS = [*PUBLISHED, *DIGITS, *IMAGES, *FAMILY, *NEIGHBOURS, *CONSISTENCY, *TOYS, *FLOWS]
EXPERIMENTS += [*EDM_TABLE_ONE, "efm/toys.py", "efm/digits.py"]


def load(path: str):
    """The config of an experiment, its file executed as config_flags does it: by path."""
    spec = importlib.util.spec_from_file_location("experiment", ROOT / "configs" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def flatten_published(tree: dict, prefix: str = "") -> dict:
    """`{"a": {"b": [1]}}` as `{"a.b": [1]}`."""
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flatten_published(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


@pytest.mark.parametrize("path", PUBLISHED)
def test_values_are_the_published_ones(path):
    expected = flatten_published(PUBLISHED[path]) | DEFECTS.get(path, {})
    expected = {key: value for key, value in expected.items() if key not in UNREAD}
    config = flatten(load(path))
    assert expected.keys() <= config.keys()
    assert {key: config[key] for key in expected} == expected


def test_unread_keys_are_published_and_nowhere_else():
    published = {key for tree in PUBLISHED.values() for key in flatten_published(tree)}
    assert UNREAD.keys() <= published
    assert not UNREAD.keys() & flatten(get_default_config()).keys()
    assert published - UNREAD.keys() <= flatten(get_default_config()).keys()


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_experiments_have_every_key_and_no_other(path):
    config, default = load(path), get_default_config()
    assert flatten(config).keys() == flatten(default).keys()
    for key in flatten(default):
        section, _, name = key.rpartition(".")
        owners = [c[section] if section else c for c in (config, default)]
        assert owners[0].get_type(name) == owners[1].get_type(name), key
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.model.nff = 3
    with pytest.raises(KeyError):
        config.update({"training": {"model": "ddpmpp"}})


def test_every_key_is_explained_and_its_default_is_allowed():
    for name, key in KEYS.items():
        assert re.fullmatch(r"\S[^\n]*\S", key.meaning), name
        assert re.fullmatch(r"\S[^\n]*\S", str(key.allowed)), name
        chosen = name in ("data.dataset", "training.sde", "model.name")  # set by every experiment
        assert key.accepts(key.default) != chosen, name


def test_words_are_no_tuple_of_numbers():
    for name in ("eval.rescale_norms", "model.attn_resolutions"):
        assert KEYS[name].accepts(())
        assert KEYS[name].accepts([])
        assert not KEYS[name].accepts("")
        assert not KEYS[name].accepts(b"")
    assert not KEYS["model.attn_resolutions"].accepts(range(3))


@pytest.mark.parametrize("D", [0.5, 1, 128.0, 10**12, math.inf])
def test_dimensions_that_are_allowed(D):
    assert KEYS["model.D"].accepts(D)


@pytest.mark.parametrize("D", [0, 0.49, 1.1e12, 1e300, -math.inf, math.nan, "inf"])
def test_dimensions_that_are_refused(D):
    assert not KEYS["model.D"].accepts(D)
    assert str(KEYS["model.D"].allowed) == "a number from 0.5 to 1,000,000,000,000, or inf"


def test_the_page_of_keys_is_that_of_the_table():
    assert (ROOT / "docs/config.md").read_text() == page()


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_experiments_have_values_that_are_allowed(path):
    check(load(path))


# Batch, learning rate, dropout, millions of images and of the EMA's half-life, evaluations. Source:
# github.com/NVlabs/edm, the commands in README.md, the defaults in docs/train-help.txt and train.py
# (of the method of arXiv 2206.00364); README.md of github.com/Newbeeer/pfgmpp has these commands
# with D added. ImageNet's published samples took 256 stochastic steps; here it has FFHQ's
# deterministic ones.
EDM_TABLE = {
    "cifar10": (512, 1e-3, 0.13, 200, 0.5, 35),
    "ffhq64": (256, 2e-4, 0.05, 200, 0.5, 79),
    "imagenet64": (4096, 1e-4, 0.10, 2500, 50, 79),
}


# Channels, multipliers, blocks, widths with attention, entries of the augmentation labels,
# augmentation. Source: train.py and training/networks.py there.
EDM_NETWORKS = {
    "cifar10": (128, [2, 2, 2], 4, [16], 9, True),
    "ffhq64": (128, [1, 2, 2, 2], 4, [16], 9, True),
    "imagenet64": (192, [1, 2, 3, 4], 3, [32, 16, 8], 0, False),
}


def _data(path):
    return re.split(r"[/_]", path)[1]


@pytest.mark.parametrize("path", FAMILY)
def test_edm_has_the_published_networks(path):
    config = flatten(load(path))
    names = ("nf", "ch_mult", "num_res_blocks", "attn_resolutions", "augment_dim")
    augment = config["training.augment"]
    assert augment == {"cifar10": 0.12, "ffhq64": 0.15, "imagenet64": 0.0}[_data(path)]
    network = (*(config[f"model.{name}"] for name in names), augment > 0)
    assert not config["data.random_flip"]  # a plain flip would not tell the network
    assert network == EDM_NETWORKS[_data(path)]
    assert (config["optim.beta1"], config["optim.eps"]) == (0.9, 1e-8)
    style = tuple(config[f"model.{name}"] for name in ("embedding_type", "progressive_input"))
    if "ncsnpp" in path:
        assert style == ("fourier", "residual")
        assert config["model.fir"] and config["model.fir_kernel"] == [1, 3, 3, 1]
    elif "ddpmpp" in path:
        assert style == ("positional", "none")
        assert not config["model.fir"]


@pytest.mark.parametrize("path", FAMILY)
def test_edm_trains_as_published(path):
    config = load(path)
    training, optim, model, sampling_ = (
        config[section] for section in ("training", "optim", "model", "sampling")
    )
    batch, lr, dropout, images, half_life, nfe = EDM_TABLE[_data(path)]
    values = (training.batch_size, optim.lr, model.dropout, model.ema_half_life / 1e6)
    assert values == (batch, lr, dropout, half_life)
    assert training.n_iters * batch == pytest.approx(images * 1e6, rel=1e-4)
    assert optim.warmup * batch == pytest.approx(10e6, rel=1e-3)
    assert math.ceil(training.n_iters / training.snapshot_freq) == config.eval.end_ckpt == 10
    assert optim.grad_clip < 0
    assert (model.sigma_data, model.P_mean, model.P_std) == (0.5, -1.2, 1.2)
    assert (sampling_.sigma_min, sampling_.sigma_max, sampling_.rho) == (0.002, 80.0, 7.0)
    assert nfe == 2 * sampling_.N - 1
    method = methods.get_method(config)
    assert {"edm": math.inf, "pfgmpp": 128.0 if "ffhq" in path else 2048.0}[
        path.split("/")[0]
    ] == method.D
    sampling.get_sampling_fn(config, method)


@pytest.mark.parametrize("sde", ["poisson", "pfgmpp", "edm", "vesde", "vpsde", "subvpsde"])
@pytest.mark.parametrize("path", DIGITS)
def test_any_method_by_one_override(path, sde):
    config = load(path)
    config.training.sde = sde
    config.model.nf = 8

    def check_labels():
        models.check_labels(config.model, sde, config.training.continuous)

    if config.model.scale_by_sigma and sde != "vesde":
        with pytest.raises(ValueError, match="set model.scale_by_sigma=False"):
            check_labels()
        config.model.scale_by_sigma = False
    if config.model.embedding_type == "fourier" and sde in ("pfgmpp", "edm"):
        with pytest.raises(ValueError, match="set model.embedding_type='positional'"):
            check_labels()
        config.model.embedding_type = "positional"
    check_labels()
    models.create_model(config)
    sampling.get_sampling_fn(config, methods.get_method(config))


@pytest.mark.parametrize("n_iters", [1, 2, 3, 4, 5, 7, 8, 10, 11, 399, 2000, 50000])
@pytest.mark.parametrize(
    ("path", "most"),
    [("poisson/digits_ddpmpp.py", 4), ("vp/images32_ddpmpp.py", 10), ("pfgmpp/digits_demo.py", 12)],
)
def test_any_number_of_steps(path, most, n_iters):
    config = load(path)
    config.training.n_iters = n_iters
    freq = config.training.snapshot_freq
    assert freq == math.ceil(n_iters / most)
    last = math.ceil(n_iters / freq)  # the checkpoint of the last step
    assert config.eval.steps == "last"
    assert config.eval.begin_ckpt == config.eval.end_ckpt == last
    assert 1 <= last <= most
    assert config.optim.warmup + config.optim.cooldown <= n_iters
    assert 0 <= config.model.ema_rate < 1


@pytest.mark.parametrize("path", DIGITS)
def test_digits_take_35_evaluations(path):
    sampler = load(path).sampling
    assert (sampler.method, sampler.ode_solver, sampler.N) == ("ode", "heun", 18)


def test_each_share_can_be_overridden():
    config = load("poisson/digits_ddpmpp.py")
    config.eval.begin_ckpt = 2
    config.training.snapshot_freq = 200
    assert (config.eval.begin_ckpt, config.eval.end_ckpt) == (2, 10)


@pytest.mark.parametrize("path", IMAGES)
def test_what_the_images_themselves_tell_is_open(path):
    config = load(path)
    assert config.data.num_channels == 0
    assert config.training.M is config.sampling.z_max is config.sampling.upper_norm is None
    config.training.M, config.sampling.z_max = 261, 17
    assert isinstance(config.sampling.z_max, float)


def test_ema_of_the_images_follows_the_steps():
    config = load("vp/images32_ddpmpp.py")
    assert config.model.ema_rate == pytest.approx(0.9998, abs=1e-6)
    config.training.n_iters = 2000
    assert config.model.ema_rate == pytest.approx(0.995, abs=1e-4)


@pytest.mark.parametrize("path", PUBLISHED)
def test_calls_do_not_share_state(path):
    first = load(path)
    first.model.nf = 7
    first.data.dataset = "other"
    assert load(path).model.nf != 7
    assert load(path).data.dataset != "other"


def test_every_experiment_is_published_or_listed():
    files = {str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").glob("*/**/*.py")}
    assert files == set(EXPERIMENTS)


@pytest.mark.parametrize("key", ["dataset", "bpd_dataset"])
def test_evaluated_split_has_two_names(key):
    config = load("poisson/cifar10_ddpmpp.py")
    config.eval[key] = "train"
    assert config.eval.dataset == config.eval.bpd_dataset == "train"


def test_loads_as_a_flag(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from absl import app\n"
        "from ml_collections import config_flags\n"
        "flag = config_flags.DEFINE_config_file('config')\n"
        "def main(_):\n"
        "    config = flag.value\n"
        "    print(config.eval.dataset, config.model.ch_mult, config.model.sigma_max)\n"
        "app.run(main)\n"
    )
    command = [
        sys.executable,
        script,
        f"--config={ROOT}/configs/vp/cifar10_ddpmpp.py",
        "--config.eval.bpd_dataset=train",
        "--config.model.ch_mult=(1,2)",
        "--config.model.sigma_max=60",
    ]
    result = Program(command, cwd=tmp_path).finish()
    assert result.stdout.strip() == "train (1, 2) 60.0"


@pytest.mark.parametrize(
    "key, expected",
    [
        ("training.n_iter", '. Did you mean "training.n_iters"?'),
        ("trainin.n_iters", '. Did you mean "training.n_iters"?'),
        ("evl.batch_size", '. Did you mean "eval.batch_size"?'),
        ("data.nf", '. Did you mean "model.nf"?'),
        ("seeed", '. Did you mean "seed"?'),
        ("modle", '. Did you mean "model"?'),
        ("nothing.like_it", ""),
    ],
)
def test_unknown_keys_are_explained_by_the_nearest(key, expected):
    keys = flatten(get_default_config())
    assert explain_unknown(key, keys) == f"unknown config value {key}{expected}"
    assert "published key that nothing reads" in explain_unknown("model.z_max", keys)


NAMES = {
    "poisson/digits_ddpmpp.py": "PFGM",
    "pfgmpp/digits_ddpmpp.py": "PFGM++, D = 2048",
    "edm/digits_ddpmpp.py": "EDM",
    "ve/digits_ncsnpp.py": "VE SDE",
    "vp/digits_ddpmpp.py": "VP SDE",
    "subvp/digits_ddpmpp.py": "sub-VP SDE",
}


@pytest.mark.parametrize("path", NAMES)
def test_methods_are_called_as_in_their_papers(path):
    assert methods.get_method(load(path)).name == NAMES[path]
