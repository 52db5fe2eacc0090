"""Config values without effect: each is reported, and each really has none."""

import functools
import re

import pytest
import torch
from conftest import ROOT
from test_configs import EXPERIMENTS, load
from warm_start import run_main

from configs.default import all_keys
from configs.effects import PARTS, SET, rows, without_effect
from configs.keys import get, of_part
from configs.schema import Key, whole
from losses import get_loss_fn
from methods import get_method
from models import NETWORKS, create_model
from sampling import get_sampling_fn
from training import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

# --- attention where no level has it --------------------------------------------------------------


def remarks(path, **model):
    config = load(path)
    config.data.image_size = model.pop("image_size", config.data.image_size) or 32
    config.data.num_channels = config.data.num_channels or 3
    config.model.update(**model)
    with torch.device("meta"):
        return getattr(create_model(config), "remarks", [])


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_networks_of_all_experiments_have_the_attention_that_is_asked_for(path):
    assert remarks(path) == []


@pytest.mark.parametrize("size, levels", [(12, "12, 6, 3"), (20, "20, 10, 5"), (28, "28, 14, 7")])
@pytest.mark.parametrize("name", ["ncsnpp", "ddpm", "edm_unet", "adm", "edm2"])
def test_attention_that_no_level_has_is_said(name, size, levels):
    (line,) = remarks(
        "pfgmpp/images16_ddpmpp.py", image_size=size, name=name, nf=64, attn_resolutions=(16, 4)
    )
    assert f"no attention at 16, 4: the levels of the network are {levels} wide" in line


@pytest.mark.parametrize(
    "resolutions, missing", [((8,), None), ((8, 16), None), ((4, 5), "5"), ((0,), None), ((), None)]
)
def test_only_attention_that_falls_away_is_said(resolutions, missing):
    lines = remarks("pfgmpp/images16_ddpmpp.py", attn_resolutions=resolutions)
    assert len(lines) == bool(missing)
    assert all(f"no attention at {missing}: " in line for line in lines)


@pytest.mark.parametrize("nf, where", [(32, "16"), (16, "16, 4, nor in the middle"), (64, None)])
def test_features_too_narrow_for_a_head_of_adm_are_said(nf, where):
    model = {"name": "adm", "nf": nf, "ch_mult": (1, 3, 3), "attn_resolutions": (16, 4)}
    lines = remarks("pfgmpp/images16_ddpmpp.py", **model)
    assert len(lines) == bool(where)
    assert all(f"no attention at {where}: too few channels" in line for line in lines)


# --- keys that have no effect beside others -------------------------------------------------------

TINY = {
    "device": "cpu",
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.num_res_blocks": 1,
    "model.num_scales": 3,
    "model.beta_max": 2.0,
    "sampling.N": 3,
    "sampling.ode_solver": "heun",
    "sampling.rtol": 0.5,
    "sampling.atol": 0.5,
    "sampling.max_evaluations": 60,
    "training.batch_size": 4,
    "training.small_batch_size": 0,
}
OF_METHOD = {
    "poisson": "poisson/digits_ddpmpp.py",
    "pfgmpp": "pfgmpp/digits_ddpmpp.py",
    "edm": "edm/digits_ddpmpp.py",
    "vesde": "ve/digits_ncsnpp.py",
    "vpsde": "vp/digits_ddpmpp.py",
    "subvpsde": "subvp/digits_ddpmpp.py",
    "flow": "flow/digits_ddpmpp.py",
    "trigflow": "trigflow/digits_ddpmpp.py",
    "edm_vp": "edm/digits_ddpmpp.py",
    "edm_ve": "edm/digits_ddpmpp.py",
    "iddpm": "edm/digits_ddpmpp.py",
    "efm": "efm/digits.py",
}
# {key: a value that is not what `configured` gives}, of those that change what is computed
OTHER = {
    "data": {},
    "training": {
        "gamma": 2.0,
        "tau": 0.05,
        "M": 100,
        "restrict_M": False,
        "label_dropout": 0.5,
        "condition_dropout": 0.5,
        "target": "posterior_mean",
        "reduce_mean": True,
        "uncertainty_features": 64,
        "likelihood_weighting": True,
        "metric_samples": 30,
        "snapshot_solver": "dpmpp",
    },
    "model": {
        "sigma_end": 0.02,
        "D": 99.0,
        "sigma_data": 0.7,
        "P_mean": -1.0,
        "P_std": 1.0,
        "sigma_min": 0.02,
        "sigma_max": 40.0,
        "beta_min": 0.2,
        "beta_max": 2.5,
        "ema_rate": 0.99,
        "ch_mult": (2,),
        "attn_resolutions": (8,),
        "resamp_with_conv": False,
        "conditional": False,
        "dropout": 0.3,
        "num_res_blocks": 2,
        "skip_rescale": False,
        "embedding_type": "fourier",
        "resblock_type": "ddpm",
        "fir": True,
        "fir_kernel": (1, 2, 1),
        "progressive": "output_skip",
        "init_scale": 0.5,
        "progressive_input": "input_skip",
        "progressive_combine": "cat",
        "fourier_scale": 2.0,
        "checkpoint_activations": True,
        "head_width": 16,
        "patch": 1,
        "depth": 2,
        "heads": 2,
    },
    "sampling": {
        "init_level": 0.7,
        "init_weight": 0.5,
        "z_max": 30.0,
        "z_min": 0.01,
        "z_exp": 2.0,
        "upper_norm": 100.0,
        "radius": 9.0,
        "sigma_min": 0.01,
        "sigma_max": 40.0,
        "ode_solver": "dpmpp",
        "schedule": "logsnr",
        "order": 1,
        "rho": 3.0,
        "N": 4,
        "S_churn": 2.0,
        "S_min": 0.3,
        "S_max": 0.4,
        "S_noise": 1.5,
        "predictor": "reverse_diffusion",
        "corrector": "langevin",
        "probability_flow": True,
        "n_steps_each": 2,
        "snr": 0.3,
        "guidance_interval": (1, 2),
        "restore_noise": 0.2,
        "restorer": "dps",
        "restore_resample": 2,
        "restore_degrade": True,
        "restore_mask": "0,0,4,4",
        "restore_path": "images",
        "film_format": "gif",
        "levels": (2.0, 0.2),
        "noise_removal": False,
        "restore": "denoise",
    },
    "consistency": {
        "q": 3.0,
        "stages": 2,
        "growth": 0.5,
        "k": 7.0,
        "b": 2.0,
        "c": 0.5,
        "P_mean": 0.5,
        "P_std": 0.5,
    },
    "flow": {"times": "logit_normal"},
    "efm": {"L": 3.0},
}
CONSISTENCY = {
    "training.sde": "edm",
    "training.objective": "consistency",
    "sampling.method": "consistency",
    "sampling.levels": (1.0, 0.3),
    "consistency.growth": 0.0,
}


def configured(when=None, **values):
    """A tiny config of digits in which `when` holds."""
    when = {key: set_to[0] if set_to is not SET else 0.5 for key, set_to in (when or {}).items()}
    values = when | {key.replace("__", "."): value for key, value in values.items()}
    if "consistency" in values.values():
        values = CONSISTENCY | values
    if "field_lines" in values.values():
        values = {"training.sde": "efm"} | values
    sde = values.get("training.sde", "edm" if "sampling.S_churn" in values else "vpsde")
    config = load(OF_METHOD[sde])
    config.update_from_flattened_dict(TINY)
    if values.get("model.name", "ncsnpp") in ("ncsn", "ncsnv2_64"):
        config.training.continuous = False
        config.model.scale_by_sigma = values["model.name"] != "ncsn"
    config.update_from_flattened_dict(values)
    return config


def outcome(config):
    """Method, sums of weights, loss, samples, their evaluations and EMA of a config."""
    torch.manual_seed(0)
    method, network = get_method(config), create_model(config)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(4, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for p in network.parameters():  # the last layers begin at 0
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        loss = get_loss_fn(config, method)(network, batch, generator)
        network.eval()
        samples, evaluations = get_sampling_fn(config, method)(network, 2, generator=generator)
    weights = [(name, p.double().sum().item()) for name, p in network.state_dict().items()]
    ema = TrainState.from_config(config, network, get_loss_fn(config, method)).ema
    return (
        # but for numbers that change the loss, where they change anything
        re.sub("(P_[a-z]+|times)=[^,)]*", "", repr(method)),
        weights,
        loss.item(),
        samples.nan_to_num(9.0).tolist(),  # nan: field lines that have not ended
        evaluations,
        (ema.decay, ema.rise(9)),
    )


@functools.cache
def outcome_where(when):
    return outcome(configured(dict(when)))


ALL = [
    (when, f"{section}.{name}", OTHER[section][name])
    for when, section, names in rows()
    for name in names.split()
    if section not in ("data", "eval")
]
# beside each choice of a part, the keys that only other choices read
WIDER = ("ncsnv2_128", "ncsnv2_256")  # ncsnv2_64 again, for larger images
for selector, parts in PARTS.items():
    declared = {key for part in parts.values() for key in of_part(part, "keys")}
    ALL += [
        ({selector: (name,)}, key, OTHER[key.partition(".")[0]][key.partition(".")[2]])
        for name, part in parts.items()
        for key in sorted(declared - {*of_part(part, "keys"), *of_part(part, "reads")})
        if key.partition(".")[2] in OTHER[key.partition(".")[0]] and name not in WIDER
    ]


@pytest.mark.parametrize(
    "when, key, other", ALL, ids=[f"{k}-{i}" for i, (_, k, _) in enumerate(ALL)]
)
def test_a_value_that_is_said_to_have_no_effect_has_none(when, key, other):
    config = configured(when)
    before = outcome_where(tuple(when.items()))
    config.update_from_flattened_dict({key: other})
    if other:
        (line,) = without_effect(config, [key])
        assert line.startswith(f"{key}={other!r} has no effect with ")
    assert outcome(config) == before


@pytest.mark.parametrize(
    "values, keys",
    [
        ({"training__sde": "poisson"}, "training.gamma sampling.z_exp model.sigma_end"),
        ({"training__sde": "pfgmpp"}, "model.D model.sigma_data sampling.sigma_max model.P_mean"),
        ({"training__sde": "vesde"}, "model.sigma_max model.fourier_scale"),
        ({"training__sde": "vpsde"}, "model.beta_min training.likelihood_weighting model.ema_rate"),
        ({"model__name": "ncsnpp"}, "model.attn_resolutions model.ch_mult model.skip_rescale"),
        ({"sampling__method": "ode"}, "sampling.N sampling.rho sampling.ode_solver"),
        ({"sampling__ode_solver": "unipc"}, "sampling.order sampling.schedule"),
        ({"sampling__method": "pc", "sampling__corrector": "langevin"}, "sampling.snr"),
        ({"sampling__method": "pc"}, "sampling.predictor sampling.corrector"),
        ({"sampling__S_churn": 2.0}, "sampling.S_noise sampling.S_max"),
        (
            {"training__objective": "consistency"},
            "consistency.q consistency.k consistency.b consistency.c consistency.P_mean "
            "consistency.P_std training.target sampling.levels",
        ),
    ],
)
def test_a_value_that_has_an_effect_is_not_said_to_have_none(values, keys):
    before = outcome(configured(**values))
    for key in keys.split():
        section, name = key.split(".")
        config = configured(**values)
        config.update_from_flattened_dict({key: OTHER[section][name]})
        assert without_effect(config, [key]) == []
        assert outcome(config) != before, key


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_what_parts_say_that_they_read_are_keys_of_others(parts):
    for part in parts.values():
        reads = of_part(part, "reads")
        assert {*reads, *filter(None, reads.values())} <= all_keys().keys()
        assert not {*reads} & {*of_part(part, "keys")}


def test_a_new_part_brings_along_which_keys_it_reads(monkeypatch):
    class Thin:
        keys = {"model.thickness": Key(3, whole(1), "Thin")}
        reads = {"model.ch_mult": None, "model.dropout": "model.conditional"}

    monkeypatch.setitem(NETWORKS, "thin", Thin)
    config = load("vp/digits_ddpmpp.py")
    keys = ("model.thickness", "model.ch_mult", "model.dropout", "model.skip_rescale")
    config.model.dropout = 0.1
    beside = " has no effect with model.name='ncsnpp'"
    assert without_effect(config, keys) == [f"model.thickness=3{beside}"]
    config.model.name = "Thin"
    beside = " has no effect with model.name='Thin'"
    assert without_effect(config, keys) == [f"model.skip_rescale=True{beside}"]
    config.model.conditional = False
    assert without_effect(config, keys) == [
        f"model.dropout=0.1{beside} and model.conditional=False",
        f"model.skip_rescale=True{beside}",
    ]


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_what_an_experiment_sets_is_nobodys_mistake(path):
    """An experiment's own keys draw no remark, nor do a user's that switch something off."""
    config = load(path)
    assert without_effect(config, []) == []
    off = [key for key in all_keys() if not get(config, key)]
    assert without_effect(config, off) == []


def test_the_command_line_is_told(tmp_path):
    """A start of training says nothing of `eval`, since its evaluation is not chosen yet."""
    options = "sampling.ode_solver=rk45 sampling.N=20 sampling.S_min=0.1 seed=3 training.gamma=3"
    flags = [f"--config.{each}" for each in options.split()] + ["--noconfig.data.random_flip"]
    flags += ["--noconfig.eval.enable_sampling", "--config.eval.features=pixels"]
    config = ["--config", str(ROOT / "configs/vp/digits_ddpmpp.py"), "--workdir", str(tmp_path)]
    done = run_main(["--mode=train", "--dry_run", *config, *flags])
    lines = [line for line in done.stdout.splitlines() if "has no effect" in line]
    assert lines == [
        "sampling.N=20 has no effect with sampling.ode_solver='rk45'",
        "sampling.S_min=0.1 has no effect with sampling.S_churn=0.0",
        "training.gamma=3.0 has no effect with training.sde='vpsde'",
    ]


@pytest.mark.parametrize(
    "values, key, words",
    [
        ({}, "data.path", "data.dataset='digits'"),
        ({"data.dataset": "lsun"}, "data.category", None),
        ({"training.augment": 0.1}, "data.random_flip", "training.augment=0.1"),
        ({"eval.enable_sampling": False}, "eval.features", "eval.enable_sampling=False"),
        ({"eval.enable_sampling": False, "eval.save_images": True}, "eval.num_samples", None),
        ({"eval.enable_bpd": False}, "eval.bpd_num_repeats", "eval.enable_bpd=False"),
        ({"eval.enable_bpd": False, "sampling.encode": "a.png"}, "eval.divergence", None),
        ({}, "eval.rescale_norms", "eval.enable_rescale=False"),
    ],
)
def test_data_and_evaluation(values, key, words):
    config = configured(**values)
    examples = {"data.path": "photos", "data.category": "bedroom", "eval.rescale_norms": (1.0, 2.0)}
    config.update_from_flattened_dict({k: v for k, v in examples.items() if k == key})
    config.data.random_flip = True
    lines = without_effect(config, [key])
    assert len(lines) == bool(words)
    assert all(line.endswith(f"has no effect with {words}") for line in lines)
