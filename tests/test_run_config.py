"""A run's stored config: saved and read back, and taken from untrusted files."""

import json
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_configs import EXPERIMENTS, load

from configs.default import get_default_config
from configs.published import UNREAD
from storage import run_config
from storage.checkpoints import save_checkpoint
from storage.run_config import differences, flatten, restore


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_there_and_back(path):
    config = load(path)
    flat = flatten(config)
    again = restore(json.loads(json.dumps(flat)))
    assert flatten(again) == flat
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.model.ch_mult, tuple)
    assert again.is_locked
    assert differences(flat, flatten(again)) == []


def test_what_is_stored_is_plain():
    config = load("poisson/digits_ddpmpp.py")
    flat = flatten(config)
    assert flat["training.snapshot_freq"] == 500
    assert flat["model.ch_mult"] == [1, 2]
    assert flat["sampling.z_max"] == 17.9
    for value in flat.values():
        for entry in value if type(value) is list else [value]:
            assert type(entry) in run_config.PRIMITIVES


def test_missing_keys_have_their_defaults():
    config = restore({"model.nf": 16, "training.M": 5, "sampling.z_max": 17, "model.ch_mult": [3]})
    assert (config.model.nf, config.training.M, config.model.ch_mult) == (16, 5, (3,))
    assert type(config.sampling.z_max) is float
    assert config.sampling.upper_norm is None
    assert config.optim.lr == get_default_config().optim.lr


def test_keys_that_came_later_have_the_values_of_before():
    assert get_default_config().data.rules == 0
    assert restore({"model.nf": 16}).data.rules == 1
    assert restore({"data.rules": 2}).data.rules == 2
    config = restore({})
    assert differences({}, flatten(config)) == []
    config.data.rules = 2
    assert differences({}, flatten(config)) == ["data.rules: 1 -> 2"]


def test_removed_keys_are_ignored_and_told(caplog):
    caplog.set_level(logging.INFO)
    flat = dict.fromkeys(UNREAD, 3) | {"seed": 7}
    assert restore(flat).seed == 7
    assert "nothing reads" in caplog.text
    assert all(key in caplog.text for key in UNREAD)
    assert differences(flat, flatten(restore(flat))) == []


BAD = {
    "no dictionary": ([("seed", 3)], "no dictionary but list"),
    "nothing": (None, "no dictionary but NoneType"),
    "unknown": ({"training.n_iter": 3}, 'value training.n_iter. Did you mean "training.n_iters"'),
    "several": ({"training.n_iter": 3, "x": 4, "y": 5}, "training.n_iter.*; also unknown: x, y$"),
    "section": ({"training": 3}, "unknown config value training"),
    "key": ({3: 4}, "a key of type int"),
    "nested": ({"training": {"n_iters": 3}}, "value of training holds something of type dict"),
    "tensor": ({"model.nf": torch.ones(())}, "value of model.nf holds something of type Tensor"),
    "lists": ({"model.ch_mult": [[1]]}, "value of model.ch_mult holds something of type list"),
    "text": (
        {"model.nf": "8"},
        "value of model.nf must be a .* from 1 to 4,096, not '8'",
    ),
    "bool": ({"model.nf": True}, "value of model.nf must be a whole number .*, not True"),
    "number": ({"model.fir": 1}, "value of model.fir must be True or False, not 1"),
    "float": ({"model.nf": 8.0}, "value of model.nf must be a whole number .*, not 8.0"),
    "none": ({"model.nf": None}, "value of model.nf must be a whole number .*, not None"),
    "list": ({"model.name": ["ddpm"]}, "value of model.name must be one of .*ncsnpp"),
    "no list": ({"model.ch_mult": 1}, "value of model.ch_mult must be a tuple of .*, not 1"),
    "huge": ({"optim.lr": 10**5000}, "value of optim.lr must be a number .*, not a huge number"),
    "lines": ({"model.nf": "\n\x1b[2J" * 99}, r"whole number .*, not '\\n\\x1b\[2J.*\.\.\."),
    "lines in a key": ({"a\nb": 1}, r"unknown config value a\\nb"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_config_is_one_line(case):
    flat, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        restore(flat)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@given(
    st.dictionaries(st.sampled_from(sorted(flatten(get_default_config()))) | st.text(), ANYTHING)
)
def test_any_content_restores_or_is_refused(flat):
    try:
        config = restore(flat)
    except ValueError as error:
        assert str(error).isprintable()
        return
    assert flatten(config).keys() == flatten(get_default_config()).keys()
    for line in differences(flat, flatten(get_default_config())):
        assert line.isprintable()


def test_differences_are_named():
    old, new = flatten(load("vp/digits_ddpmpp.py")), flatten(load("vp/digits_ddpmpp.py"))
    new |= {"model.nf": 8, "model.ch_mult": [1], "sampling.schedule": "uniform"}
    del old["sampling.schedule"], old["seed"]  # as an older program did not store them
    assert differences(old, new) == [
        "model.ch_mult: [1, 2] -> [1]",
        "model.nf: 32 -> 8",
        "sampling.schedule: 'auto' -> 'uniform'",
    ]
    with pytest.raises(ValueError, match="no dictionary"):
        differences(3, new)


# --- where it lies --------------------------------------------------------------------------------


def save(path, step, **content):
    state = {"model": {}, "ema": {}, "optimizer": {}, "step": step}
    save_checkpoint(path, state | content)


def stored(nf):
    return {"config": flatten(load("vp/digits_ddpmpp.py")) | {"model.nf": nf}}


def test_the_newest_intact_checkpoint_carries_the_config(tmp_path, caplog):
    newest = tmp_path / "checkpoints-meta/checkpoint.pth"
    with pytest.raises(ValueError, match="nothing in .* carries a config: --config is needed"):
        run_config.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model.nf": 1}))
    assert run_config.load(tmp_path).model.nf == 1
    save(tmp_path / "checkpoints/checkpoint_4.pth", 4)  # published: without a config
    assert run_config.load(tmp_path).model.nf == 1
    for step in (5, 10, 9):
        save(tmp_path / f"checkpoints/checkpoint_{step}.pth", step, **stored(step))
    (tmp_path / "checkpoints/checkpoint_x.pth").write_bytes(b"")
    assert run_config.load(tmp_path).model.nf == 10
    save(newest, 12, **stored(12))
    assert run_config.load(tmp_path).model.nf == 12
    save(newest.with_name("checkpoint.prev.pth"), 11, **stored(11))
    newest.write_bytes(b"damaged")
    assert run_config.load(tmp_path).model.nf == 11
    newest.with_name("checkpoint.prev.pth").unlink()
    assert run_config.load(tmp_path).model.nf == 10
    assert "checkpoint.pth is not a checkpoint" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"{", b"\xff", b'{"seed": "x"}', b"[" * 10**5, b'{"seed": ' + b"9" * 5000 + b"}"],
)
def test_what_is_no_config_json_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json.*--config") as error:
        run_config.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_hostile_config_in_a_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "checkpoints-meta/checkpoint.pth"
    save(path, 3, config={"model.nf": torch.ones(3)})
    with pytest.raises(ValueError, match=r"checkpoint\.pth: the stored value of model\.nf holds"):
        run_config.load(tmp_path)


def test_a_stored_value_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"stored value of optim\.lr must be .*, not nan"):
        restore({"optim.lr": math.nan})
