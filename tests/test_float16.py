"""Training and sampling in float16: the scale of the loss, skipped steps, resuming."""

import copy
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, train_state
from many_lives import small_config
from test_faults import same
from test_training import Line, step_of
from torch import nn
from warm_start import Program

import execution
import run_lib
from configs.poisson import cifar10_ddpmpp
from library.loss_watch import LossWatch
from optimizers import loss_scale
from storage.checkpoints import load_checkpoint


def test_the_scale_is_that_of_pytorch(monkeypatch):
    monkeypatch.setattr(loss_scale, "PATIENCE", 3)
    ours = loss_scale.LossScale(torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in (True, False, *[True] * 4, False, False, *[True] * 6):
        theirs.scale(weight.sum()).backward()
        weight.grad[1] *= 1 if finite else torch.inf
        gradient = weight.grad.clone()
        theirs.unscale_(optimizer)
        ours.unscale([gradient])
        assert torch.equal(gradient, weight.grad)
        theirs.step(optimizer)
        theirs.update()
        ours.update(gradient.isfinite().all())
        assert ours.factor == theirs.get_scale()
        optimizer.zero_grad()


def test_the_scale_of_a_training_that_has_diverged_stays_above_0():
    scale = loss_scale.LossScale()
    for _ in range(200):  # 2^(16 - 200) is 0 in float32
        scale.update(torch.tensor(False))
    gradient = torch.ones(1)
    scale.unscale([gradient])
    assert gradient == 1 / scale.factor and gradient.isfinite()


def in_float16(model=None, **optim):
    """A training state of one weight, with a scaled loss."""
    config = cifar10_ddpmpp.get_config()
    config.training.precision = "fp16"
    config.optim.update(warmup=0, grad_clip=-1.0, **optim)
    return train_state(config, Line() if model is None else model)


def through_float16(net):
    """A loss whose gradient, 1 times the scale, passes through float16: 65,536 is too large."""
    return net.weight.half().float().sum()


@pytest.mark.parametrize("nonfinite", ["skip", "replace"])
def test_an_overflow_leaves_the_step_out_and_halves_the_scale(nonfinite):
    state = in_float16(nonfinite=nonfinite)
    before = copy.deepcopy(state.state_dict())
    assert step_of(state, through_float16).isnan()
    after = state.state_dict()
    assert (after["step"], after["loss_scale"]["factor"].item()) == (1, 2.0**15)
    assert after["ema"]["num_updates"] == 1
    for entry in ("model", "optimizer"):
        assert same(after[entry], before[entry])
    assert same(after["ema"]["shadow_params"], before["ema"]["shadow_params"])
    assert step_of(state, through_float16) == 1
    assert state.model.weight.grad == 1  # not scaled any more
    assert state.loss_scale.finite_steps == 1
    assert not torch.equal(state.model.weight, before["model"]["weight"])


def test_small_gradients_survive():
    """1e-6 of a loss is a gradient below the least number of float16 after a factor of 0.01."""
    state = in_float16()
    step_of(state, through_float16)  # halves the scale
    step_of(state, lambda net: 0.01 * (0.01 * (1e-4 * net.weight.float()).half()).float().sum())
    torch.testing.assert_close(state.model.weight.grad, torch.tensor([1e-8]), rtol=2e-3, atol=0)


def test_a_run_in_float16_resumes_bit_for_bit(tmp_path, one_thread):
    def config(steps):
        return small_config(
            **{"training.n_iters": steps, "training.precision": "fp16", "training.accumulate": 2}
        )

    assert run_lib.train(config(7), tmp_path / "whole")
    assert run_lib.train(config(4), tmp_path / "resumed")
    assert run_lib.train(config(7), tmp_path / "resumed")
    ends = [
        load_checkpoint(tmp_path / name / "checkpoints-meta/checkpoint.pth") | {"written": []}
        for name in ("whole", "resumed")
    ]
    assert same(*ends)
    assert 0 < ends[0]["loss_scale"]["factor"] < 2.0**16  # steps were skipped


def test_a_scale_of_a_file_is_checked_and_may_be_missing():
    state = in_float16()
    step_of(state, through_float16)
    content = copy.deepcopy(state.state_dict())
    begun = in_float16()
    begun.load_state_dict(content)
    assert same(begun.state_dict(), content)
    in_fp32 = train_state(cifar10_ddpmpp.get_config(), Line())
    in_fp32.load_state_dict(content)
    assert "loss_scale" not in in_fp32.state_dict()
    begun = in_float16()
    begun.load_state_dict(in_fp32.state_dict())
    assert begun.loss_scale.factor == 2.0**16
    for wrong, words in (
        ({"factor": torch.tensor(0.0)}, "factor is not above 0: 0.0"),
        ({"factor": torch.tensor(torch.inf)}, "factor is not finite"),
        ({"finite_steps": 3}, "no dense tensor"),
        ({"other": 3}, "unknown entry 'other'"),
    ):
        with pytest.raises(ValueError, match=words):
            in_float16().load_state_dict(content | {"loss_scale": content["loss_scale"] | wrong})


@pytest.mark.slow
def test_an_overflow_in_one_process_leaves_the_step_out_in_all(tmp_path):
    script = tmp_path / "overflow.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import torch, distributed\n"
        "from test_float16 import in_float16, step_of, through_float16\n"
        "from test_training import Line\n"
        "class Net(Line):\n"
        "    def forward(self, scale):\n"
        "        return (scale * self.weight.half()).float().sum()\n"
        "with distributed.joined():\n"
        "    state = in_float16(Net())\n"
        "    state.network = distributed.averaging_gradients(state.model)\n"
        "    step_of(state, lambda net: net(1))\n"  # too large in both
        "    r = distributed.rank()\n"
        "    step_of(state, lambda net: net(4 if r else 1))\n"  # in one
        "    assert state.loss_scale.factor == 2.0**14, state.loss_scale.factor\n"
        "    assert state.model.weight == 1\n"
        "    step_of(state, lambda net: net(1))\n"
        "    assert state.model.weight != 1\n"
        "    state.check_agreement()\n"
    )
    Program([sys.executable, script], processes=2).finish()


@pytest.mark.parametrize("gain", [2, 1])
def test_auto_takes_float16_on_a_gpu_without_bfloat16(monkeypatch, gain):
    clock, gpu = [0.0], SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    network = nn.Identity()
    monkeypatch.setattr(network, "parameters", lambda: iter([gpu]))

    def run(form):
        half = isinstance(form, execution.HalfPrecision)
        assert not half or form.dtype == torch.float16
        clock[0] += 1 if half else gain

    precision, reason = execution.measured_precision(network, run)
    assert precision == ("fp16" if gain == 2 else "fp32")
    assert reason == f"float16 is measured to be {gain:.2f} times as fast as float32"
    with pytest.raises(ValueError, match=r"cuda has no bfloat16; use 'fp16' or 'fp32'"):
        execution.check_precision("bf16", gpu.device)
    execution.check_precision("fp16", gpu.device)


def test_a_log_says_that_a_step_is_left_out(caplog):
    watch = LossWatch(20, "replace", "fp16")
    watch.add(3, torch.tensor(torch.nan))
    watch.look()
    (line,) = caplog.messages
    assert line == (
        "batch 3: the loss or its gradient is not finite (the step is skipped and the scale of "
        "the loss is halved, 1 in a row)"
    )


def test_a_device_without_float64_is_one_line(monkeypatch):
    def of_apple(*arguments, dtype, device):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, "empty", of_apple)
    with pytest.raises(ValueError, match=r"device='mps' has no float64, .*: use device=cpu"):
        execution.named_device("mps")
