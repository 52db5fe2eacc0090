"""Pairs through the real program: train, resume, evaluate, sample; what is refused in one line."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from warm_start import run_main

from experiment import load
from storage.checkpoints import load_checkpoint

CONFIG = ROOT / "configs/pfgmpp/denoise_ddpmpp.py"
SIDE, NUMBER = 8, 40
TINY = [
    *("--config.model.nf=8", "--config.model.ch_mult=(1,)", "--config.model.attn_resolutions=()"),
    *("--config.training.batch_size=8", "--config.training.log_freq=5"),
    *("--config.training.snapshot_freq=10", "--config.optim.warmup=0", "--config.optim.cooldown=0"),
    *("--config.model.ema_rate=0.9", "--config.training.condition_dropout=0.2"),
    # Muon orthogonalises the rounding that two processes differ by
    *(
        "--config.optim.optimizer=Adam",
        "--config.optim.lr=1e-3",
        "--config.training.precision=fp32",
    ),
    *("--config.data.held_out=10", "--config.data.random_flip", "--config.sampling.N=3"),
    *("--config.eval.pairs=8", "--config.eval.pair_draws=4", "--config.eval.batch_size=12"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with clean.npy, noisy.npy, of which a few lie in few.npy, and a trained run."""
    folder, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    clean = random.normal(50, 20, (NUMBER, SIDE, SIDE, 1)).astype(np.float32)
    noisy = clean + random.normal(0, 5, clean.shape).astype(np.float32)
    np.save(folder / "clean.npy", clean)
    np.save(folder / "noisy.npy", noisy)
    np.save(folder / "few.npy", noisy[:3])
    train(folder, folder / "run", 20)
    return folder


def train(places, workdir, steps, *more, processes=1):
    paths = [f"--config.data.path={places / 'clean.npy'}"]
    paths += [f"--config.data.condition_path={places / 'noisy.npy'}"]
    flags = ["--config", CONFIG, "--mode", "train", "--workdir", workdir, *paths, *TINY]
    done = run_main([*flags, f"--config.training.n_iters={steps}", *more], processes=processes)
    return done.stdout + done.stderr


def output_of(flags, expect=0):
    done = run_main(flags, expect)
    return done.stdout + done.stderr


def weights(workdir, step):
    return load_checkpoint(workdir / f"checkpoints/checkpoint_{step}.pth")["model"]


def test_a_run_is_resumed_bit_for_bit_and_keeps_its_numbers(places, tmp_path):
    train(places, tmp_path, 10)
    output = train(places, tmp_path, 20, "--config.data.resident_bytes=0")
    assert "resuming at step 10" in output
    for name, value in weights(places / "run", 20).items():
        assert torch.equal(value, weights(tmp_path, 20)[name]), name
    config = load_checkpoint(tmp_path / "checkpoints/checkpoint_20.pth")["config"]
    assert config["data.condition_channels"] == 1 and config["data.condition_dtype"] == "float32"
    assert config["data.condition_mean"] == pytest.approx([50], abs=2)


def test_two_processes_train_as_one(places, tmp_path):
    train(places, tmp_path, 10, "--config.data.resident_bytes=0", processes=2)
    for name, value in weights(places / "run", 10).items():
        torch.testing.assert_close(weights(tmp_path, 10)[name], value, rtol=1e-3, atol=1e-4)


def test_other_conditions_are_not_those_of_the_run(places, tmp_path):
    changed = np.load(places / "noisy.npy")[::-1]
    np.save(tmp_path / "noisy.npy", changed)
    more = f"--config.data.condition_path={tmp_path / 'noisy.npy'}"
    flags = ["--mode", "eval", "--workdir", places / "run", more]
    output = output_of(flags, 2)
    assert "the data are not those of the run" in output and "Traceback" not in output


def test_an_evaluation_shows_its_numbers_and_resumes(places):
    flags = ["--mode", "eval", "--workdir", places / "run"]
    output = output_of(flags)
    report = dict(np.load(places / "run/eval/report_2.npz"))
    page = (places / "run/eval/report.html").read_text()
    draws = sorted((places / "run/eval").glob("ckpt_2_pairs_*.npz"))
    assert [int(report[f"pairs_{name}"]) for name in ("images", "draws", "nfe")] == [8, 4, 3]
    assert len(draws) == 3  # of three conditions each
    for label in ("PSNR of one draw", "SSIM of mean of the draws", "PSNR of the condition itself"):
        assert label in output and label in page
    assert "coverage between draws 1 and 4 in order" in page
    assert "<b>Figure 1. Pairs.</b>" in page
    assert f"{report['pairs_psnr']:.4g}" in output

    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    trained = load(places / "run")
    split = trained.experiment.data.get("test")
    within = trained.experiment.codec.within_window
    truth = within(split.images[:8].permute(0, 2, 3, 1).numpy())
    images = [np.load(path)["draws"] for path in draws]
    images = within(np.concatenate(images).reshape(8, 4, SIDE, SIDE, 1))
    for name, compared in (("", images[:, 0]), ("_mean", images.mean(1))):
        similar, ratios = [], []
        for one, other in zip(compared, truth, strict=True):
            options = {"data_range": 1.0, "channel_axis": -1, "win_size": 7}
            similar.append(structural_similarity(one, other, **options))
            ratios.append(peak_signal_noise_ratio(other, one, data_range=1.0))
        assert report[f"pairs_ssim{name}"] == pytest.approx(np.mean(similar))
        assert report[f"pairs_psnr{name}"] == pytest.approx(np.mean(ratios))

    before = [path.stat().st_mtime_ns for path in draws]
    draws[1].unlink()
    run_main(flags)
    after = [path.stat().st_mtime_ns for path in draws]
    assert after[0] == before[0] and after[2] == before[2]
    again = dict(np.load(places / "run/eval/report_2.npz"))
    assert again["pairs_psnr"] == report["pairs_psnr"]


def test_samples_are_draws_for_each_condition(places, tmp_path):
    flags = ["--mode", "sample", "--workdir", places / "run", "--outdir", tmp_path]
    condition = f"--config.sampling.condition={places / 'few.npy'}"
    run_main([*flags, condition, "--config.sampling.seeds=0-1"])
    samples = np.load(tmp_path / "samples.npz")
    posterior = np.load(tmp_path / "posterior.npz")
    assert samples["samples"].shape == (6, SIDE, SIDE, 1)
    assert samples["seeds"].tolist() == [0, 0, 0, 1, 1, 1]
    assert posterior["names"].tolist() == ["few.npy:0", "few.npy:1", "few.npy:2"]
    draws = samples["samples"].reshape(2, 3, SIDE, SIDE, 1).astype(float)
    np.testing.assert_allclose(posterior["mean"], draws.mean(0), rtol=1e-6)
    np.testing.assert_allclose(posterior["std"], draws.std(0, ddof=1), rtol=1e-6)
    other_scale = [condition, "--config.sampling.seeds=0-1", "--config.data.condition_std=(9.0,)"]
    assert "holds samples of other settings (condition:" in output_of([*flags, *other_scale], 2)
    with Image.open(tmp_path / "posterior.png") as picture:
        assert picture.size[0] > picture.size[1]  # 4 columns, 3 rows
    trained = load(places / "run")
    condition = torch.from_numpy(np.load(places / "few.npy")).permute(0, 3, 1, 2)
    one = trained.sample([1], condition=condition[2])[0].permute(1, 2, 0)
    np.testing.assert_allclose(one, draws[1, 2], rtol=1e-4, atol=1e-3)
    all_of_seed = trained.sample([1, 1, 1], condition=condition).permute(0, 2, 3, 1)
    np.testing.assert_allclose(all_of_seed, draws[1], rtol=1e-4, atol=1e-3)


def test_what_cannot_be_sampled_is_refused_in_one_line(places, tmp_path):
    flags = ["--mode", "sample", "--workdir", places / "run", "--outdir", tmp_path]
    noisy = np.load(places / "few.npy")
    wrong = {
        "sides": (noisy[:, :6], "must hold arrays of the shape (8, 8, 1)"),
        "channels": (noisy.repeat(2, 3), "must hold arrays of the shape (8, 8, 1)"),
        "finite": (np.where(noisy > 50, np.nan, noisy), "is nan: replace what is not finite"),
    }
    lines = {(): "the network is given an image as the condition of each sample, and none is named"}
    for name, (array, line) in wrong.items():
        np.save(tmp_path / f"{name}.npy", array)
        lines[f"--config.sampling.condition={tmp_path / name}.npy",] = line
    good = f"--config.sampling.condition={places / 'few.npy'}"
    start = "--config.sampling.init=condition"
    lines[good, start, "--config.sampling.init_level=100"] = "sampling.init_level=100 must be"
    lines[good, "--config.sampling.restore=denoise"] = "sampling.restore restores images"
    for more, line in lines.items():
        output = output_of([*flags, *more], 2)
        assert line in output and "Traceback" not in output
        assert len([text for text in output.splitlines() if text.startswith("error:")]) == 1
    trained = load(places / "run")
    good = torch.from_numpy(noisy).permute(0, 3, 1, 2)
    for condition, line in (
        (None, "none is named"),
        (good[:, :, :6], "condition must be one image"),
        (good * torch.nan, "arrays must be finite"),
        (good[:2], "or one for each of 3 samples"),
    ):
        with pytest.raises(ValueError, match=line):
            trained.sample(range(3), condition=condition)


def test_one_evaluation_from_the_condition(places, tmp_path):
    flags = ["--mode", "eval", "--workdir", places / "run", "--eval_folder", "one"]
    start = ["--config.sampling.init=condition", "--config.sampling.init_level=0.3"]
    output = output_of([*flags, *start, "--config.sampling.N=1"])
    report = np.load(places / "run/one/report_2.npz")
    assert report["pairs_nfe"] == 1 and report["pairs_spread"] < 1e-6
    assert "coverage" in output
    page = (places / "run/one/report.html").read_text()
    assert "from the condition at 0.3" in page
