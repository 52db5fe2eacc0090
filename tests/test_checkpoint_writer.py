"""Checkpoints that a thread writes while training goes on."""

import contextlib
import copy
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from many_lives import small_config
from test_faults import same

import run_lib
from library import training_run
from storage.checkpoint_writer import CheckpointWriter
from storage.checkpoints import load_checkpoint
from storage.run_checkpoints import save_state
from training import TrainState

LONGEST = 60  # seconds that anything here waits


@pytest.fixture
def writer():
    with CheckpointWriter() as writer:
        yield writer


def test_what_is_written_is_the_state_of_the_moment(writer):
    weight = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = {"step": 3, "model": {"weight": weight, "count": torch.tensor(7.0)}, "all": [weight]}
    before, go_on, contents = copy.deepcopy(state), threading.Event(), []

    def write(content):
        assert go_on.wait(LONGEST)
        contents.append(content)

    assert writer.save(state, write) is None
    weight.zero_()
    state["step"] = 4
    go_on.set()
    writer.wait()
    (content,) = contents
    assert same(content, before)
    assert content["model"]["weight"].stride() == weight.stride()


def test_an_error_of_the_thread_is_logged_beside_the_one_that_ends_training(caplog):
    def fail(content):
        raise OSError(28, "No space left on device", "checkpoint.pth")

    with pytest.raises(FloatingPointError), CheckpointWriter() as writer:
        writer.save({}, fail)
        raise FloatingPointError
    assert "the last checkpoint is not written: [Errno 28] No space left on device" in caplog.text


@pytest.mark.parametrize("looks", ["save", "check", "wait", "exit"])
def test_an_error_of_the_thread_is_raised_where_training_looks(looks):
    def fail(content):
        raise OSError(28, "No space left on device", "checkpoint.pth")

    message = "No space left on device: 'checkpoint.pth'"
    with pytest.raises(OSError, match=message), CheckpointWriter() as writer:
        writer.save({}, fail)
        deadline = time.monotonic() + LONGEST
        while looks == "check" and time.monotonic() < deadline:
            writer.check()
        if looks == "save":
            writer.save({}, fail)
        if looks == "wait":
            writer.wait()
        assert looks == "exit"


def test_an_error_of_training_is_told_after_the_state_is_written():
    contents = []
    with pytest.raises(FloatingPointError), CheckpointWriter() as writer:
        writer.save({"step": 1}, lambda content: (time.sleep(0.05), contents.append(content)))
        raise FloatingPointError
    assert contents == [{"step": 1}]


@pytest.fixture
def slow(monkeypatch):
    """Lets a save end two steps later, or with step `last`; notes its step and that of its end."""
    pace = SimpleNamespace(last=0, step=0, saves=[])
    step = run_lib.train_step

    def save_slowly(workdir, state, **options):
        deadline, end = time.monotonic() + LONGEST, min(state["step"] + 2, pace.last)
        while pace.step < end and time.monotonic() < deadline:
            time.sleep(1e-3)
        save_state(workdir, state, **options)
        pace.saves.append((state["step"], pace.step))

    def counted(state, *arguments):
        loss = step(state, *arguments)
        pace.step = state.step
        return loss

    monkeypatch.setattr(training_run, "save_state", save_slowly)
    monkeypatch.setattr(run_lib, "train_step", counted)
    return pace


def test_steps_go_on_while_a_state_is_written(tmp_path, one_thread, slow, monkeypatch):
    """The files equal those of a training that waits for each save."""
    frequencies = {"training.snapshot_freq": 4, "training.snapshot_freq_for_preemption": 4}
    config = small_config(**frequencies, **{"training.n_iters": 9, "training.keep_checkpoints": 2})
    slow.last = 9
    assert run_lib.train(config, tmp_path / "thread")
    (_, meanwhile), *rest = slow.saves
    assert meanwhile >= 6 and rest == [(8, 9), (9, 9)]
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", lambda self, state, write: write(state))
        slow.last = 0
        assert run_lib.train(config, tmp_path / "waiting")
    files = [
        {path.relative_to(tmp_path / run): load_checkpoint(path) for path in paths}
        for run in ("thread", "waiting")
        if (paths := sorted((tmp_path / run).glob("checkpoints*/*.pth")))
    ]
    names = {"checkpoint_8.pth", "checkpoint_9.pth", "checkpoint.pth", "checkpoint.prev.pth"}
    assert {path.name for path in files[0]} == names
    assert same(*files)


def test_a_signal_waits_for_the_state_that_is_written(tmp_path, one_thread, slow, monkeypatch):
    step = run_lib.train_step

    def step_then_signal(state, *arguments):
        loss = step(state, *arguments)
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(run_lib, "train_step", step_then_signal)
    slow.last = 4
    assert not run_lib.train(small_config(), tmp_path)
    assert slow.saves == [(3, 4), (4, 4)]
    assert load_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] == 4


def test_a_gpu_copies_on_a_stream_of_its_own_and_its_next_step_waits(monkeypatch):
    """By streams and events that tell their calls, since nothing here has a GPU."""
    calls = []

    def told(name):
        def call(*arguments):
            calls.append((name, *arguments))

        return call

    event = SimpleNamespace(
        record=told("record"), synchronize=told("synchronize"), wait=told("wait")
    )
    stream = SimpleNamespace(wait_stream=told("wait_stream"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    with CheckpointWriter("cuda:1") as writer:
        copied = writer.save({"step": 1}, told("write"))
    assert copied is event
    assert calls == [
        ("wait_stream", "current of cuda:1"),
        ("record", stream),
        ("synchronize",),
        ("write", {"step": 1}),
    ]
    parameter = SimpleNamespace(device=torch.device("cuda:1"))
    state = SimpleNamespace(copied=event, parameters=[parameter])
    TrainState.wait_for_copy(state)
    TrainState.wait_for_copy(state)
    assert calls[4:] == [("wait", "current of cuda:1")] and state.copied is None
