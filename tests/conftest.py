"""Fixtures of all tests: numbers of the published implementations, exact fields, the GPU's mark."""

import os
import signal
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
import methods
from methods.field import poisson_field
from models import create_model
from solvers import fitted
from training import TrainState

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


# With a module of this name tensorboard reads files by itself and imports no TensorFlow.
sys.modules["tensorboard.compat.notf"] = types.ModuleType("tensorboard.compat.notf")

# A shell lets what it starts in the background ignore Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def run_program(command, expect=0):
    """Starts a `command` whose processes have one thread each; asserts its exit status.

    For what is about the start; others fork a process that has imported all: warm_start.py.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def objective_of(config):
    """The objective that `config` names, of the method that it names."""
    return losses.get_loss_fn(config, methods.get_method(config))


def train_state(config, model=None, objective=None):
    """A new training state; network and objective are the config's where none is given."""
    model = create_model(config) if model is None else model
    objective = objective_of(config) if objective is None else objective
    return TrainState.from_config(config, model, objective)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Cache checksums of the tests' data in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Make `os.fsync` do nothing in the test process, whose files need not outlast a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def one_thread():
    """Restrict PyTorch to one thread: for small tensors, and for comparison with such processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_trajectories(monkeypatch):
    """Fit schedules and steps to few trajectories, for speed."""
    monkeypatch.setattr(fitted, "MOST_FOR_LEVELS", 32)
    monkeypatch.setattr(fitted, "MOST_FOR_STEPS", 64)


@pytest.fixture(scope="session")
def golden():
    """Tensors measured on the published implementations, by name; scalars as numbers."""
    with np.load(GOLDEN / "methods.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in arrays.items()}


@pytest.fixture(scope="session")
def poisson():
    """The Poisson method that the golden numbers were measured with."""
    return methods.Poisson(
        sigma_end=0.01,
        tau=0.03,
        M=291,
        restrict_M=True,
        gamma=5.0,
        z_max=40.0,
        z_min=1e-3,
        z_exp=5.0,
        upper_norm=3000.0,
    )


@pytest.fixture(scope="session")
def exact_network():
    """`exact_network(charges, gamma)`: a network whose output is the field of `charges`."""

    def make(charges, gamma):
        def net(x, z):
            points = torch.cat([x.flatten(1), z[:, None]], dim=1)
            field = poisson_field(points, charges, gamma)
            return field[:, :-1].view_as(x), field[:, -1]

        return net

    return make


def peak(call):
    """The most bytes of Python and numpy at a time during `call`."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escapes what is no UTF-8 in captured output, which xdist could not send."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report
