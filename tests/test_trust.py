"""Values of a stranger's workdir that run code, or write or read files, are not taken."""

import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, train_state
from warm_start import Program

from configs import machine
from configs.default import all_keys, get_default_config
from configs.pfgmpp import digits_ddpmpp
from experiment import Experiment, load
from sources.codec import check_codec
from storage import run_config
from storage.checkpoints import save_checkpoint
from storage.workdir import checkpoint_path

OF_MACHINE = {
    "start": {"training.init_from"},
    "always": {"eval.inception_path", "eval.stats_dir", "sampling.guide", "data.codec"},
    "file": {
        *(
            "data.path",
            "data.condition_path",
            "data.prior_path",
            "data.data_dir",
            "data.tfrecords_path",
        ),
        *("sampling.restore_path", "sampling.restore_mask"),
        *("sampling.encode", "sampling.between", "sampling.condition"),
    },
}


def stranger(**values):
    config = digits_ddpmpp.get_config()
    config.model.nf = 8
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in values.items()}
    )
    return config


def test_keys_of_a_machine():
    for kind, names in OF_MACHINE.items():
        assert {name for name, key in all_keys().items() if key.of_machine == kind} == names


def test_values_of_a_machine_become_defaults():
    values = {"eval__stats_dir": "/home/victim", "sampling__guide": "guide.pth"}
    config = stranger(**values, data__path="photos", training__n_iters=7)
    assert machine.reset(config) == {
        "eval.stats_dir": "/home/victim",
        "sampling.guide": "guide.pth",
    }
    default = get_default_config()
    assert config.eval.stats_dir == default.eval.stats_dir
    assert (config.sampling.guide, config.data.path) == ("", "photos")  # a workdir keeps its data
    config.training.init_from = "runs/a"
    values = {"data.path": "photos", "training.init_from": "runs/a"}
    assert machine.reset(config, single_file=True) == values
    assert (config.data.path, config.training.n_iters) == ("", 7)
    assert machine.reset(config, single_file=True) == {}


@pytest.mark.parametrize(
    "values, overridden, mode, missing",
    [
        ({"eval.stats_dir": "x"}, [], "eval", ["eval.stats_dir"]),
        ({"eval.stats_dir": "x"}, ["eval.stats_dir"], "eval", []),
        ({"eval.stats_dir": "x"}, [], "sample", []),
        ({"eval.inception_path": "x.ts"}, [], "eval", ["eval.inception_path"]),
        ({"data.path": "x"}, [], "sample", []),
        *(({"training.init_from": "x"}, [], mode, []) for mode in ("eval", "sample", "export")),
    ],
)
def test_what_a_mode_needs(values, overridden, mode, missing):
    config = stranger(eval__enable_sampling=True)
    assert [*machine.missing(config, values, overridden, mode)] == missing


def test_values_without_effect_are_not_needed():
    config = stranger(eval__enable_sampling=False)
    assert machine.missing(config, {"eval.stats_dir": "x"}, [], "eval") == {}


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_the_line_has_the_flags(mode, tmp_path):
    """Nothing is written at the place that the workdir names, and pasting the command goes on."""
    outside, workdir = tmp_path / "outside", tmp_path / "run"
    key = "eval.stats_dir" if mode == "eval" else "sampling.guide"
    config = stranger(eval__enable_sampling=True, sampling__guidance=2.0)
    config.update_from_flattened_dict({key: str(outside / "a b")})
    run_config.store(workdir, run_config.flatten(config))
    command = [sys.executable, str(ROOT / "main.py"), "--mode", mode, "--workdir", str(workdir)]
    line = Program(command).finish(2).stderr
    assert line.startswith(f"error: {key} may run code or write files")
    assert line.count("\n") == 1
    pasted = shlex.split(line.partition("or start: ")[2])
    assert pasted[-1] == f"--config.{key}={outside / 'a b'}"
    for trusting in (pasted, [*command, "--trust_workdir"], [*command, "-trust_workdir=true"]):
        assert "trust_workdir" not in Program(trusting).finish(2).stderr  # no checkpoint there
    assert not outside.exists()


def test_the_library_takes_no_values_of_a_machine(tmp_path):
    config = stranger(sampling__guide="guide.pth", sampling__guidance=2.0)
    experiment = Experiment.build(stranger())
    state = train_state(config, experiment.network, experiment.objective)
    content = state.state_dict() | {"config": run_config.flatten(config)}
    path = checkpoint_path(tmp_path, 0)
    save_checkpoint(path, content)
    with pytest.raises(ValueError, match=r"sampling\.guide.* or trust=True"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"guide\.pth"):
        load(tmp_path, trust=True)
    with pytest.raises(FileNotFoundError, match=r"other\.pth"):
        load(tmp_path, {"sampling.guide": "other.pth"})
    config.update_from_flattened_dict({"sampling.guide": "", "data.path": "photos"})
    save_checkpoint(path, content | {"config": run_config.flatten(config)})
    options = {"sampling.guidance": 1.0}
    assert load(path, options).experiment.config.data.path == ""
    assert load(path, options, trust=True).experiment.config.data.path == "photos"
    assert load(tmp_path, options).experiment.config.data.path == "photos"


def test_a_codec_is_that_of_the_run():
    codec = Experiment.build(stranger()).codec
    check_codec(codec, {}, Path("x"))  # an older run does not say
    check_codec(codec, {"codec": codec.identity}, Path("x"))
    with pytest.raises(
        ValueError, match=r"^x: the network was trained with the codec 'other', not"
    ):
        check_codec(codec, {"codec": "other"}, Path("x"))
