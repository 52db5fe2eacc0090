"""EMA weights and moments divided among processes: the same run, with less memory in each."""

import itertools
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, train_state
from test_faults import same
from torch import nn
from warm_start import Program, run_main

import distributed
from configs.poisson import cifar10_ddpmpp
from optimizers.shares import Shares
from storage.checkpoints import load_checkpoint

# Muon and Adam, power-function averages, weights of the objective, pictures, metrics, the best
# state, the held-out loss: all that the divided state takes part in.
FLAGS = [
    *("--config", str(ROOT / "configs/pfgmpp/digits_ddpmpp.py"), "--mode", "train"),
    *("--config.model.nf=8", "--config.model.ch_mult=(1,)", "--config.model.ema_stds=(0.05,0.1)"),
    *("--config.training.objective=uncertainty", "--config.optim.optimizer=Muon"),
    *("--config.training.batch_size=32", "--config.training.snapshot_freq=2"),
    *("--config.training.eval_freq=2", "--config.training.metric_freq=2"),
    *("--config.training.metric_samples=8", "--config.training.picture_freq=1"),
    *("--config.sampling.ode_solver=forward_euler", "--config.sampling.N=2"),
    *("--config.optim.warmup=0", "--config.optim.cooldown=0"),
]


def train(workdir, steps, *flags):
    run_main(
        [*FLAGS, "--workdir", workdir, f"--config.training.n_iters={steps}", *flags], processes=2
    )
    files = {path.name: load_checkpoint(path) for path in workdir.glob("checkpoints*/*.pth")}
    for content in files.values():
        del content["config"]
    return files, np.load(workdir / f"samples/iter_{steps}/sample.npz")["samples"]


@pytest.mark.slow
def test_a_divided_state_trains_and_resumes_as_a_whole_one(tmp_path):
    """Bit for bit, and the files have the same form; each process can go on from either."""
    whole, pictures = train(tmp_path / "whole", 4)
    train(tmp_path / "divided", 2, "--config.training.share_state")
    divided, samples = train(tmp_path / "divided", 4, "--config.training.share_state")
    assert whole.keys() >= {"checkpoint_2.pth", "checkpoint_4.pth", "best.pth", "checkpoint.pth"}
    assert same(divided, whole)
    assert np.array_equal(samples, pictures)


def test_each_parameter_has_one_owner_and_owners_about_as_much(monkeypatch):
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 100, 7, 60, 40, 3, 30, 9)]
    owned = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "world", lambda: 3)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        owned.append({n for n, p in enumerate(parameters) if Shares(parameters).is_own(p)})
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(owned, 2))
    assert set.union(*owned) == {*range(8)}
    assert max(sum(parameters[n].numel() for n in share) for share in owned) == 100


def test_an_optimiser_without_moments_at_the_start_cannot_be_divided(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    config = cifar10_ddpmpp.get_config()
    config.training.share_state, config.optim.optimizer = True, "RAdam"
    with pytest.raises(ValueError, match="share_state needs an optimiser .*'Adam' or 'Muon'"):
        train_state(config, nn.Linear(2, 3))


@pytest.mark.slow
def test_there_may_be_more_processes_than_parameters(tmp_path):
    script = tmp_path / "few.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import torch, distributed\n"
        "from conftest import train_state\n"
        "from configs.poisson import cifar10_ddpmpp\n"
        "from test_faults import same\n"
        "from test_training import Line, step_of\n"
        "config = cifar10_ddpmpp.get_config()\n"
        "config.training.share_state, config.optim.warmup = True, 0\n"
        "config.model.ema_stds, config.optim.optimizer = (0.1,), 'Muon'\n"
        "with distributed.joined():\n"
        "    divided = train_state(config, Line())\n"
        "    config.training.share_state = False\n"
        "    whole = train_state(config, Line())\n"
        "    for state in (divided, whole):\n"
        "        step_of(state, lambda net: net.weight.sum())\n"
        "    assert divided.model.weight == whole.model.weight != 1\n"
        "    saved = divided.state_dict()\n"
        "    assert distributed.rank() or same(saved, whole.state_dict())\n"
        "    divided.load_state_dict(whole.state_dict())\n"
    )
    Program([sys.executable, script], processes=2).finish()


@pytest.mark.slow
def test_a_share_is_small_and_the_state_complete(tmp_path):
    """Three processes: two of the five tensors, or one, each; all of them in what is saved."""
    script = tmp_path / "share.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import torch, distributed\n"
        "from torch import nn\n"
        "from conftest import train_state\n"
        "from configs.poisson import cifar10_ddpmpp\n"
        "from optimizers.shares import completed\n"
        "config = cifar10_ddpmpp.get_config()\n"
        "config.training.share_state = True\n"
        "torch.manual_seed(0)\n"
        "net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 1, bias=False))\n"
        "with distributed.joined():\n"
        "    r = distributed.rank()\n"
        "    state = train_state(config, net)\n"
        "    here = [not w.is_meta for w in state.ema.shadow_params]\n"
        "    assert here == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 1]][r], (r, here)\n"
        "    assert len(state.optimizer.state) == sum(here)\n"
        "    state.gather_ema()\n"
        "    assert all(map(torch.equal, state.gathered_ema, net.parameters()))\n"
        "    saved = state.state_dict()\n"
        "    if not r:\n"
        "        config.training.share_state = False\n"
        "        expected = train_state(config, net).state_dict()\n"
        "        from test_faults import same\n"
        "        assert same(saved, expected), (saved, expected)\n"
    )
    Program([sys.executable, script], processes=3).finish()
