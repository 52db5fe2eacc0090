"""The experiments' configs against the published hyper-parameters, and how they are loaded."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads((ROOT / "tests/golden/configs.json").read_text())

# Keys that this framework needs and no published config has, or those of one method only.
OURS = {
    "device",
    "data.data_dir",
    "data.num_workers",
    "data.path",
    "data.resident_bytes",
    "training.keep_checkpoints",
    "training.max_bad_steps",
    "training.accumulate",
    "training.channels_last",
    "training.compile",
    "training.precision",
    "model.checkpoint_activations",
    "optim.cooldown",
    "sampling.ode_solver",
    "sampling.N",
    "sampling.rho",
    "sampling.rtol",
    "sampling.atol",
    "sampling.compile",
    "eval.bpd_num_repeats",
    "eval.dataset",
    "eval.divergence",
    "eval.features",
    "eval.inception_path",
    "eval.stats_dir",
    "eval.enable_interpolate",
    "eval.enable_rescale",
    "eval.rescale_norms",
    "eval.save_images",
}

# Keys that a few published configs lack and all their siblings have.
COMPLETED = {
    "ve/celeba_ncsnpp.py": {"model.fourier_scale"},
    "ve/cifar10_ncsnpp.py": {"model.fourier_scale"},
    "vp/cifar10_ncsnpp.py": {"model.fourier_scale"},
    "ve/ncsn/celeba.py": {"training.sde"},
}
for name in ("ve/celebahq_ncsnpp_continuous.py", "ve/ffhq_ncsnpp_continuous.py"):
    COMPLETED[name] = {"model.beta_min", "model.beta_max", "eval.bpd_dataset"} | {
        f"eval.enable_{what}" for what in ("loss", "bpd", "sampling")
    }

# Values that are there only because of a defect: misspelt keys, and what the misspelling undid.
DEFECTS = {
    "ve/ncsn/celeba.py": {"training.loss": None},
    "ve/ncsnv2/bedroom.py": {"training.continuouse": None, "training.continuous": False},
}


def load(path: str):
    """The config of an experiment, its file executed as config_flags does it: by path."""
    spec = importlib.util.spec_from_file_location("experiment", ROOT / "configs" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def flatten(tree: dict, prefix: str = "") -> dict:
    """`{"a": {"b": (1,)}}` as `{"a.b": [1]}`."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


@pytest.mark.parametrize("path", PUBLISHED)
def test_values_are_the_published_ones(path):
    expected = flatten(PUBLISHED[path]) | DEFECTS.get(path, {})
    expected = {key: value for key, value in expected.items() if value is not None}
    config = flatten(load(path).to_dict())
    extra = (OURS | COMPLETED.get(path, set())) - expected.keys()
    assert {key: value for key, value in config.items() if key not in extra} == expected
    assert extra <= config.keys()


@pytest.mark.parametrize("path", PUBLISHED)
def test_calls_do_not_share_state(path):
    first = load(path)
    first.model.nf = 7
    first.data.dataset = "other"
    assert load(path).model.nf != 7
    assert load(path).data.dataset != "other"


def test_every_experiment_is_published_or_listed():
    files = {str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").glob("*/**/*.py")}
    assert files - PUBLISHED.keys() == {
        "poisson/digits_ddpmpp.py",
        "poisson/digits_ncsnpp.py",
        "subvp/digits_ddpmpp.py",
        "ve/digits_ncsnpp.py",
        "vp/digits_ddpmpp.py",
    }


@pytest.mark.parametrize("key", ["dataset", "bpd_dataset"])
def test_evaluated_split_has_two_names(key):
    config = load("poisson/cifar10_ddpmpp.py")
    config.eval[key] = "train"
    assert config.eval.dataset == config.eval.bpd_dataset == "train"


def test_loads_as_a_flag_without_torch(tmp_path):
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
        "    assert 'torch' not in sys.modules\n"
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
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "train (1, 2) 60.0"
