"""Starts of training: pictures, files that are passed over, a dry run."""

import logging
from types import SimpleNamespace

import pytest
from many_lives import small_config
from test_small_runs import tiny

import run_lib
from library.training_run import TrainingRun
from storage import run_config


def pictures(n_iters, snapshot_freq, picture_freq=100):
    """The steps whose checkpoints have a picture, in a run of `n_iters`."""
    values = {"training.n_iters": n_iters, "training.snapshot_freq": snapshot_freq}
    values["training.picture_freq"] = picture_freq
    steps = (SimpleNamespace(state=SimpleNamespace(step=s), values=values) for s in range(n_iters))
    last = SimpleNamespace(state=SimpleNamespace(step=n_iters), values=values)
    return [r.state.step for r in (*steps, last) if r.state.step and TrainingRun.picture_is_due(r)]


@pytest.mark.parametrize(
    "n_iters, snapshot_freq, steps",
    [
        (200, 17, [102, 200]),  # twelve checkpoints, of the configs for own images
        (90, 8, [90]),
        (1200, 100, [*range(100, 1300, 100)]),
        (1000, 300, [300, 600, 900, 1000]),
        (450, 60, [120, 240, 300, 420, 450]),
    ],
)
def test_a_hundred_steps_have_one_picture_at_most(n_iters, snapshot_freq, steps):
    """Pictures are of the first numbered checkpoint in each hundred steps and of the last step."""
    assert pictures(n_iters, snapshot_freq) == steps
    every = [*range(snapshot_freq, n_iters, snapshot_freq), n_iters]
    assert pictures(n_iters, snapshot_freq, picture_freq=1) == every


def test_training_draws_the_pictures_that_are_due(tmp_path):
    options = {"training__n_iters": 7, "training__snapshot_freq": 2, "training__picture_freq": 4}
    assert run_lib.train(tiny("edm/digits_ddpmpp.py", tmp_path, **options), tmp_path)
    folders = {path.parent.name for path in tmp_path.glob("samples/*/sample.png")}
    assert folders == {"iter_4", "iter_7"}
    assert len([*tmp_path.glob("checkpoints/checkpoint_*.pth")]) == 4


@pytest.mark.parametrize("place", ["model.safetensors", "checkpoints/theirs.safetensors"])
def test_a_start_beside_a_shared_file_says_that_its_weights_are_new(tmp_path, caplog, place):
    config = small_config(**{"training.n_iters": 2})
    assert run_lib.train(config, tmp_path / "first")
    run_lib.export(config, tmp_path / "first", tmp_path)
    path = tmp_path / "second" / place
    path.parent.mkdir(parents=True)
    (tmp_path / "model.safetensors").rename(path)
    caplog.set_level(logging.INFO)
    line = f"training starts at step 0 with new weights; it does not go on from {place}"
    for dry_run in (True, False):
        caplog.clear()
        assert run_lib.train(config, tmp_path / "second", dry_run)
        assert caplog.messages.count(line) == 1
    caplog.clear()
    config.training.n_iters = 3
    assert run_lib.train(config, tmp_path / "second")
    assert not any("new weights" in message for message in caplog.messages)


def test_a_dry_run_of_a_resumed_run_lists_what_its_config_changes(tmp_path, caplog):
    assert run_lib.train(small_config(**{"training.n_iters": 2}), tmp_path)
    changed = run_config.load(tmp_path)
    changed.optim.lr, changed.training.n_iters, changed.data.changed = 0.5, 9, "allow"
    caplog.set_level(logging.INFO)
    assert run_lib.train(changed, tmp_path, dry_run=True)
    changes = [m for m in caplog.messages if m.startswith("the config differs")]
    assert [change.partition(": ")[2] for change in changes] == [
        "optim.lr: 0.001 -> 0.5",
        "training.n_iters: 2 -> 9",
    ]
    assert any("would train from step 2 to 9" in message for message in caplog.messages)
