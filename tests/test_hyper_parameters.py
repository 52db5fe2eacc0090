"""The range of perturbations against its formulas worked by hand."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from warm_start import Program

from datasets import mean_norm
from methods.poisson import poisson_range


def test_range_where_logarithms_are_whole():
    """tau = 1 and norm^2 = 2 sqrt(D) sigma^2 * 2^8 give M = floor(0.75 * 8) + 1 = 7."""
    norm = math.sqrt(2 * math.sqrt(16) * 0.5**2 * 2**8.001)
    result = poisson_range(norm, 16, sigma=0.5, tau=1.0)
    assert result.M == 7
    assert result.z_max == pytest.approx(math.sqrt(2 / math.pi) * 0.5 * 128)
    assert result.upper_norm == pytest.approx(4 * 0.5 * 128)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"data_norm": 0}, "must be positive"),
        ({"sigma": -1.0}, "must be positive"),
        ({"data_norm": math.inf}, "must be positive and finite"),
        ({"tau": math.nan}, "tau at least 1e-12"),
        ({"tau": 0.0}, "tau at least 1e-12"),
        ({"tau": 1e-17}, "tau at least 1e-12"),
        ({"sigma": 1e3}, "are lost"),
        ({"sigma": 1e200}, "are lost"),
        ({"sigma": 1e-200}, r"at most 1e\+09"),  # its reach grows as 1 / sqrt(sigma)
        ({"sigma": 1e-320, "tau": 1e-12}, r"at most 1e\+09"),
        ({"tau": 1e200}, r"at most 1e\+09"),
    ],
)
def test_impossible_numbers_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        poisson_range(**({"data_norm": 30.0, "data_dim": 64} | bad))


def test_steps_of_a_tiny_tau():
    """The number of steps is 0.75 log(30^2 / 16 / 0.01^2) / tau, exact at tau = 1e-12 too."""
    expected = 0.75 * math.log(30**2 / 16 / 0.01**2) / 1e-12
    m = poisson_range(30.0, 64, tau=1e-12).M
    assert m == pytest.approx(expected, rel=1e-11)


def test_norm_of_known_images():
    data = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    data[1] = 255
    assert mean_norm(data, lambda stored: 3 * (stored / 255)) == pytest.approx(2 * 3 / 3)


def run(*arguments, expect=0):
    command = [sys.executable, ROOT / "hyper_parameters.py", *arguments]
    return Program(command, cwd=ROOT).finish(expect)


def test_the_digits_config_has_what_its_data_ask_for():
    done = run("--config", "configs/poisson/digits_ddpmpp.py")
    assert "mean norm 6.7" in done.stdout
    assert "the config has" not in done.stdout
    done = run("--config", "configs/poisson/digits_ddpmpp.py", "--data_norm", "60")
    assert done.stdout.count("the config has") == 3


def test_overrides_are_those_of_main():
    digits = ("--config", "configs/vp/digits_ddpmpp.py")
    assert "mean norm 3.8" in run(*digits, "--config.data.centered=False").stdout
    by_flag, by_config = (run(*digits, f"--{tau}=0.055") for tau in ("tau", "config.training.tau"))
    assert by_flag.stdout == by_config.stdout
    assert by_flag.stdout.count("the config has") == 1
    done = run(*digits, "--config.data.centred=False", expect=2)
    assert 'Did you mean "data.centered"?' in done.stderr


def test_open_values_are_not_compared(tmp_path):
    np.save(tmp_path / "x.npy", np.full((20, 32, 32, 3), 255, np.uint8))
    options = (f"--config.data.path={tmp_path / 'x.npy'}", "--config.data.num_channels=3")
    done = run("--config", "configs/poisson/images32_ddpmpp.py", *options)
    assert "mean norm 55.43 in 3072 dimensions" in done.stdout, done.stderr
    assert "the config has" not in done.stdout


def test_mistakes_are_told():
    assert "give --config" in run(expect=2).stderr
    words = "data_norm, data_dim and sigma must be positive and finite, and tau at least 1e-12"
    assert words in run("--data_norm=-1", "--data_dim=3", expect=2).stderr
    assert "nowhere.py" in run("--config", "nowhere.py", expect=2).stderr
