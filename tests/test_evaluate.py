"""Evaluation as a whole: reports, resuming, and which cached results are reused."""

import json
import re
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, train_state
from PIL import Image
from test_metrics import MeanColour, save_inception, save_torchscript
from test_report import dumped
from warm_start import MAIN, Program

import datasets
import metrics.reference
import run_lib
import sampling
from configs.poisson import digits_ddpmpp
from library import evaluated_samples
from library.evaluated_samples import samples_at
from metrics.distances import Gaussian, frechet_distance
from metrics.reference import Reference
from metrics.table import METRICS, Metric
from reports import evaluation_page
from sources import identity as identities
from storage import files
from storage.checkpoints import save_checkpoint
from storage.files import read_arrays
from storage.tensorboard import read_scalars

CONFIG = ROOT / "configs/poisson/digits_ddpmpp.py"
MEASURED = {"IS", "fid", "kid", "precision", "recall", "nearest", "loss", "bpd", "bpd_error"}


def tiny(tmp_path, **evaluate):
    """A small untrained network, three rounds of samples and two batches of likelihood.

    It has no convolutions: of a sixth of the tensors, it is saved and read in less time.
    """
    config = digits_ddpmpp.get_config()
    config.model.update(name="mlp", nf=8, ch_mult=(1,))
    config.training.n_iters = 8
    config.sampling.ode_solver, config.sampling.N = "forward_euler", 3
    config.sampling.rtol = config.sampling.atol = 1.0
    config.eval.update(
        batch_size=100, num_samples=230, bpd_num_repeats=1, stats_dir=str(tmp_path / "stats")
    )
    config.eval.update(evaluate)
    return config


def save_checkpoints(config, workdir, *numbers):
    for k in numbers:
        torch.manual_seed(config.seed + 1)
        state = train_state(config)
        state.step = k * config.training.snapshot_freq
        save_checkpoint(workdir / f"checkpoints/checkpoint_{state.step}.pth", state.state_dict())


@pytest.fixture
def workdir(tmp_path):
    save_checkpoints(tiny(tmp_path), tmp_path / "run", 4)
    return tmp_path / "run"


def evaluate(config, workdir):
    run_lib.evaluate(config, workdir)
    return report_of(workdir)


def report_of(workdir, k=4):
    with np.load(workdir / f"eval/report_{k}.npz") as file:
        return {name: file[name] for name in file.files}


def assert_same_metrics(report, other):
    assert report.keys() == other.keys()
    for name in report.keys() - {"seconds", "sampling_seconds", "bpd_seconds"}:
        np.testing.assert_array_equal(report[name], other[name], err_msg=name)


def stamps(folder, pattern="**/*_[0-9].npz"):
    return {p.name: p.stat().st_mtime_ns for p in folder.glob(pattern) if "report" not in p.name}


# --- what is there is not made again --------------------------------------------------------------


class Killed(BaseException):
    pass


def test_killed_at_every_write_it_ends_with_the_same_metrics(workdir, tmp_path, monkeypatch):
    """The process dies before its n-th file is written, n = 1, 2, ..., until it gets to the end."""
    config = tiny(tmp_path)
    expected = evaluate(config, workdir)
    first_stamps = stamps(workdir / "eval")
    shutil.rmtree(workdir / "eval")
    shutil.rmtree(config.eval.stats_dir)
    write, deaths, modules = files.atomic_write, 0, (evaluation_page, files)
    while True:
        budget = iter([True])

        def write_once(path, budget=budget):
            if not next(budget, False):
                raise Killed
            return write(path)

        # statistics, loss, 2 of likelihood, 3 + 3 of rounds; what follows is made again
        for module in modules:
            monkeypatch.setattr(module, "atomic_write", write if deaths == 10 else write_once)
        before = stamps(workdir / "eval")
        try:
            report = evaluate(config, workdir)
            break
        except Killed:
            deaths += 1
            after = stamps(workdir / "eval")
            assert before.items() <= after.items()  # nothing was written again
    assert deaths == 10
    assert stamps(workdir / "eval").keys() == first_stamps.keys()
    assert_same_metrics(report, expected)


@pytest.mark.slow
def test_sigkill_costs_nothing_but_time(workdir, tmp_path, one_thread):
    config = tiny(tmp_path)
    expected = evaluate(config, workdir)
    shutil.rmtree(workdir / "eval")
    overrides = [f"--config.eval.stats_dir={config.eval.stats_dir}"]
    overrides += ["--config.model.name=mlp", "--config.model.nf=8", "--config.model.ch_mult=(1,)"]
    overrides += ["--config.training.n_iters=8", "--config.sampling.ode_solver=forward_euler"]
    overrides += ["--config.sampling.N=3", "--config.sampling.rtol=1"]
    overrides += ["--config.sampling.atol=1", "--config.eval.batch_size=100"]
    overrides += ["--config.eval.num_samples=230", "--config.eval.bpd_num_repeats=1"]
    flags = ["--config", str(CONFIG), "--mode", "eval", "--workdir", str(workdir), *overrides]
    for awaited in ("eval/test_ckpt_4_bpd_0.npz", "eval/ckpt_4/samples_1.npz", None):
        process = Program([*MAIN, *flags])
        deadline = time.monotonic() + 120
        while awaited and process.poll() is None and time.monotonic() < deadline:
            if (workdir / awaited).exists():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
    assert process.returncode == 0
    assert_same_metrics(report_of(workdir), expected)


def change_seed(config, workdir):
    config.seed += 1


def change_sampler(config, workdir):
    config.sampling.N = 4


def change_weights(config, workdir):
    config.seed += 7
    save_checkpoints(config, workdir, 4)
    config.seed -= 7


@pytest.mark.parametrize("change", [change_seed, change_sampler, change_weights])
def test_rounds_of_another_evaluation_are_drawn_again(change, workdir, tmp_path):
    config = tiny(tmp_path, enable_bpd=False)
    before = evaluate(config, workdir)
    times = stamps(workdir / "eval")
    assert_same_metrics(evaluate(config, workdir), before)
    assert stamps(workdir / "eval") == times
    change(config, workdir)
    after = evaluate(config, workdir)
    assert after["fid"] != before["fid"]
    again = stamps(workdir / "eval")
    assert all(again[name] != times[name] for name in times)


def test_more_samples_are_added_to_those_there_are(workdir, tmp_path):
    config = tiny(tmp_path, enable_bpd=False, enable_loss=False, num_samples=200)
    evaluate(config, workdir)
    times = stamps(workdir / "eval/ckpt_4")
    config.eval.num_samples = 250
    assert evaluate(config, workdir)["num_samples"] == 250
    assert times.items() <= stamps(workdir / "eval/ckpt_4").items()
    config.eval.num_samples = 100
    assert evaluate(config, workdir)["num_samples"] == 100
    names = {p.name for p in (workdir / "eval/ckpt_4").iterdir()}
    assert names == {"samples_0.npz", "statistics_0.npz"}


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and nothing more", None])
def test_a_damaged_round_is_drawn_again(damage, workdir, tmp_path, caplog):
    config = tiny(tmp_path, enable_bpd=False)
    expected = evaluate(config, workdir)
    path = workdir / "eval/ckpt_4/samples_1.npz"
    content = path.read_bytes()
    flipped = content[:200] + bytes([content[200] ^ 255]) + content[201:]  # a byte of an array
    path.write_bytes(flipped if damage is None else damage)
    assert_same_metrics(evaluate(config, workdir), expected)
    assert f"{path} is not an array file" in caplog.text


def test_samples_are_found_in_their_rounds(tmp_path):
    rounds, every = [], np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    for r, samples in enumerate(np.split(every, [5, 5, 9])):  # a round without finite samples
        np.savez(tmp_path / f"{r}.npz", samples=samples)
        rounds.append({"path": tmp_path / f"{r}.npz", "pool_3": samples})
    rows = np.array([11, 0, 4, 5, 4, 9, 8])
    np.testing.assert_array_equal(samples_at(rounds, rows), every[rows])


def test_the_nearest_picture_shows_pairs(workdir, tmp_path):
    """The picture has below each sample the training image nearest to it in all pixels."""
    config = tiny(tmp_path, enable_bpd=False)
    report = evaluate(config, workdir)
    rounds = [np.load(workdir / f"eval/ckpt_4/samples_{r}.npz")["samples"] for r in range(3)]
    samples = np.concatenate(rounds).reshape(230, 64) / 255.0
    data = datasets.get_dataset(config, "train").flatten(1).numpy() / 255.0
    distances = np.linalg.norm(samples[:, None] - data, axis=2)
    assert report["nearest"] == pytest.approx(np.median(distances.min(1)), rel=1e-5)
    picture = np.asarray(Image.open(workdir / "eval/nearest_4.png"))[..., 0]
    cell = 6 * 8 + 2  # images enlarged 6 times, and a gap
    lower = picture[2 * cell + 2 :]
    for i in range(10):
        left = 2 + i * cell
        sample, below = (lower[top : top + 48 : 6, left : left + 48 : 6] for top in (2, 2 + cell))
        np.testing.assert_array_equal(sample.ravel(), samples[i] * 255)
        closest = np.linalg.norm(samples[i] - below.ravel() / 255.0)
        assert closest == pytest.approx(distances[i].min())


def test_checkpoints_are_evaluated_in_turn(workdir, tmp_path, caplog):
    config = tiny(tmp_path, enable_bpd=False, steps="", begin_ckpt=2, end_ckpt=4)
    save_checkpoints(config, workdir, 2)
    caplog.set_level("INFO")
    run_lib.evaluate(config, workdir)
    assert "checkpoint_6.pth does not exist; passed over" in caplog.text
    assert [report_of(workdir, k)["step"] for k in (2, 4)] == [4, 8]
    assert not (workdir / "eval/report_3.npz").exists()
    page = (workdir / "eval/report.html").read_text()
    assert page.count("<svg") >= 4  # curves over the two


def removing(monkeypatch, config, before, *numbers):
    """Remove checkpoints, as training does beside it, when that number `before` is opened."""
    opened = run_lib.open_unless_removed

    def open_after_removal(path):
        if path.name == f"checkpoint_{before * config.training.snapshot_freq}.pth":
            for k in numbers:
                step = k * config.training.snapshot_freq
                path.with_name(f"checkpoint_{step}.pth").unlink()
        return opened(path)

    monkeypatch.setattr(run_lib, "open_unless_removed", open_after_removal)


@pytest.mark.parametrize("before, gone", [(1, [1]), (1, [1, 2]), (2, [2]), (2, [1, 3]), (4, [4])])
def test_checkpoints_that_training_removes_are_passed_over(
    before, gone, workdir, tmp_path, caplog, monkeypatch
):
    config = tiny(tmp_path, enable_bpd=False, enable_sampling=False, steps="", begin_ckpt=1)
    save_checkpoints(config, workdir, 1, 2, 3)
    removing(monkeypatch, config, before, *gone)
    run_lib.evaluate(config, workdir)
    passed_over = [k for k in gone if k >= before]  # the others were evaluated before
    for k in (1, 2, 3, 4):
        assert (workdir / f"eval/report_{k}.npz").exists() == (k not in passed_over)
    assert caplog.text.count("has been removed, as by training.keep_checkpoints") == len(
        passed_over
    )


def test_an_evaluation_of_which_all_checkpoints_are_removed_is_one_line(
    workdir, tmp_path, monkeypatch
):
    config = tiny(tmp_path, enable_bpd=False, enable_sampling=False, steps="", begin_ckpt=3)
    save_checkpoints(config, workdir, 3)
    removing(monkeypatch, config, 3, 3, 4)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint is left .*checkpoint_8\.pth"):
        run_lib.evaluate(config, workdir)


# --- what does not count --------------------------------------------------------------------------


def spoil(monkeypatch, sampler):
    """`sampler(draw, number, generator)` draws in place of the configured sampler `draw`."""
    call = sampling.Sampler.__call__

    def spoilt(self, net, number, generator, **options):
        return sampler(partial(call, self), net, number, generator)

    monkeypatch.setattr(sampling.Sampler, "__call__", spoilt)


def test_samples_that_are_not_finite_are_counted_and_left_out(workdir, tmp_path, monkeypatch):
    config = tiny(tmp_path, enable_bpd=False)
    whole = evaluate(config, workdir)
    rounds = [np.load(workdir / f"eval/ckpt_4/samples_{r}.npz")["samples"] for r in range(3)]
    shutil.rmtree(workdir / "eval")

    def sampler(draw, net, number, generator):
        samples, nfe = draw(net, number, generator=generator)
        if number == 30:  # the last round
            samples[4, 0, 0, 0] = torch.nan
            samples[7] = torch.inf
        return samples, nfe

    spoil(monkeypatch, sampler)
    report = evaluate(config, workdir)
    assert (report["num_samples"], report["nonfinite"], whole["nonfinite"]) == (228, 2, 0)
    finite_samples = np.concatenate([*rounds[:2], np.delete(rounds[2], [4, 7], axis=0)])
    data = Gaussian.fit(datasets.get_dataset(config, "train").flatten(1) / 255)
    expected = Gaussian.fit(finite_samples.reshape(len(finite_samples), -1) / 255)
    fid = frechet_distance(expected, data)
    assert report["fid"] == pytest.approx(fid, rel=1e-5)
    assert "2 of 230 samples were not finite" in (workdir / "eval/report.html").read_text()


def test_a_round_whose_solver_diverges_does_not_end_the_evaluation(
    workdir, tmp_path, monkeypatch, caplog
):
    def sampler(draw, net, number, generator):
        if number == 30:
            raise FloatingPointError("rk45 cannot go on at t = 1")
        return draw(net, number, generator=generator)

    spoil(monkeypatch, sampler)
    report = evaluate(tiny(tmp_path, enable_bpd=False), workdir)
    assert (report["num_samples"], report["nonfinite"], report["nfe"]) == (200, 30, 3)
    assert "round 2: none of its 30 samples counts: rk45 cannot go on" in caplog.text


def test_an_evaluation_without_any_finite_sample_still_reports(workdir, tmp_path, monkeypatch):
    def sampler(draw, net, number, generator):
        raise FloatingPointError("no flow")

    spoil(monkeypatch, sampler)
    report = evaluate(tiny(tmp_path, enable_bpd=False), workdir)
    assert (report["num_samples"], report["nonfinite"]) == (0, 230)
    assert "fid" not in report
    assert np.isfinite(report["loss"])


# --- feature spaces and statistics ----------------------------------------------------------------


@pytest.mark.parametrize("features", ["inception", "torchscript"])
def test_feature_networks_from_end_to_end(features, workdir, tmp_path):
    path = tmp_path / "network"
    if features == "inception":
        pytest.importorskip("tensorflow_gan")
        save_inception(path)
    else:
        save_torchscript(path, MeanColour())
    config = tiny(tmp_path, features=features, inception_path=str(path))
    report = evaluate(config, workdir)
    assert report.keys() >= MEASURED
    assert all(np.isfinite(report[name]) for name in MEASURED)
    with np.load(workdir / "eval/ckpt_4/statistics_2.npz") as file:
        assert file["pool_3"].shape == file["logits"].shape == (30, 3)
    (path,) = (tmp_path / "stats").iterdir()
    assert path.name.startswith(f"digits_train_8x8x1_{features}-")
    assert ">FID<" in (workdir / "eval/report.html").read_text()


def test_a_mistake_costs_no_earlier_results(workdir, tmp_path):
    config = tiny(tmp_path)
    evaluate(config, workdir)
    before = {path: path.stat().st_mtime_ns for path in (workdir / "eval").rglob("*.*")}
    with pytest.raises(ValueError, match="eval.divergence must be one of .*not 'rademcher'"):
        evaluate(tiny(tmp_path, divergence="rademcher"), workdir)
    assert {p: p.stat().st_mtime_ns for p in (workdir / "eval").rglob("*.*")} == before


def test_data_are_measured_once(workdir, tmp_path, monkeypatch):
    config = tiny(tmp_path, enable_bpd=False)
    report = evaluate(config, workdir)
    (path,) = (tmp_path / "stats").iterdir()
    with np.load(path) as file:
        images = datasets.get_dataset(config, "train").flatten(1).numpy() / 255
        np.testing.assert_allclose(file["mu"], images.mean(0), atol=1e-7)
        np.testing.assert_allclose(file["sigma"], np.cov(images.T), atol=1e-7)
        np.testing.assert_allclose(file["pool_3"], images[file["index"]], rtol=1e-6)
    monkeypatch.setattr(Reference, "measure", None)
    monkeypatch.setattr(
        evaluated_samples, "compare_halves", lambda comparison: pytest.fail("again")
    )
    assert_same_metrics(evaluate(config, workdir), report)


@pytest.mark.parametrize("published", ["pool_3", "mu and sigma"])
def test_published_statistics_are_read(published, workdir, tmp_path):
    config = tiny(tmp_path, enable_bpd=False)
    expected = evaluate(config, workdir)
    (path,) = (tmp_path / "stats").iterdir()
    with np.load(path) as file:
        content = {name: file[name] for name in ("pool_3", "mu", "sigma")}
    path.unlink()
    names = ("pool_3",) if published == "pool_3" else ("mu", "sigma")
    np.savez(tmp_path / "stats/digits_stats.npz", **{name: content[name] for name in names})
    report = evaluate(config, workdir)
    assert report["fid"] == pytest.approx(expected["fid"], rel=1e-6)
    assert ("kid" in report) == (published == "pool_3")
    assert "nearest" not in report  # published statistics do not number the images
    assert [p.name for p in (tmp_path / "stats").iterdir()] == ["digits_stats.npz"]


def whole(**identity):
    """Statistics of 64 features that record their data and feature space."""
    return {"mu": np.ones(64), "sigma": np.eye(64), **identity}


@pytest.mark.parametrize(
    "content, pattern",
    [
        ({"pool_3": np.ones((5, 2048))}, "statistics of 2048 features, but .*'pixels' has 64"),
        ({"mu": np.ones(64), "sigma": np.ones((64, 63))}, r"sigma .*not float \(64, 64\)"),
        ({"pool_3": np.ones((1, 64))}, "pool_3 are features of 1 images, too few"),
        ({"pool_3": np.full((9, 64), np.nan)}, "pool_3 holds numbers that are not finite"),
        ({"pool_3": np.ones((9, 64)), "count": np.ones(3, int)}, r"count .* not int or uint \(\)"),
        ({"images": np.ones(3)}, "holds no statistics: neither mu and sigma nor pool_3"),
        ({"pool_3": np.ones(64)}, r"pool_3 is float64 \(64,\), not float \(n, 64\)"),
        (b"text", "is not an array file"),
        ({"mu": np.ones(64), "sigma": -np.eye(64)}, "is no covariance: it has the eigenvalue -1"),
        (
            {"mu": np.ones(64), "sigma": np.eye(64) - np.full((64, 64), 0.05)},
            "is no covariance: it has the eigenvalue -2.2",
        ),
        ({"mu": np.ones(64), "sigma": np.tri(64)}, "is no covariance: it is not symmetric, by 1"),
        ({"mu": np.ones(64), "sigma": np.full((64, 64), np.nan)}, "sigma holds numbers that are"),
        ({"mu": np.full(64, np.inf), "sigma": np.eye(64)}, "mu holds numbers that are not finite"),
        ({"pool_3": np.ones((9, 64)), "count": 5}, "of 9 images, but count is 5"),
        (
            whole(space="inception-01234567"),
            "other data: their feature space is inception-0.*not pix",
        ),
        (whole(shape="32x32x3"), "other data: their image size is 32x32x3, not 8x8x1"),
        (whole(data="01234567"), "other data: their digest is 01234567, not .*; remove it"),
        (whole(data=np.ones(3)), r"data is float64 \(3,\), not str"),
        ({"pool_3": np.ones((0, 64))}, "pool_3 are features of 0 images, too few"),
        ({"pool_3": np.ones((0, 64)), "count": 0}, "of 0 images, but count is 0"),
        ({"mu": np.ones(0), "sigma": np.ones((0, 0))}, "statistics of 0 features"),
        ({"mu": np.full(64, "1e4000", "g"), "sigma": np.eye(64)}, "mu holds numbers that are not"),
    ],
)
def test_statistics_that_do_not_fit_are_one_line(content, pattern, workdir, tmp_path):
    config = tiny(tmp_path)
    (tmp_path / "stats").mkdir()
    path = tmp_path / "stats/digits_stats.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=pattern) as caught:
        run_lib.evaluate(config, workdir)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert not (workdir / "eval").exists()


def statistics_lines(caplog):
    messages = [r.getMessage() for r in caplog.records]
    return [line for line in messages if line.startswith("statistics of the data")]


def test_statistics_say_what_they_are_of(workdir, tmp_path, caplog):
    """Statistics made here record data and space, and are known by them under a published name."""
    caplog.set_level("INFO")
    config = tiny(tmp_path, enable_bpd=False)
    expected = evaluate(config, workdir)
    (path,) = (tmp_path / "stats").iterdir()
    first, _ = statistics_lines(caplog)
    assert first.endswith("measured, as there is no digits_8_stats.npz or digits_stats.npz")
    assert str(path) in first
    caplog.clear()
    path = path.rename(tmp_path / "stats/digits_stats.npz")
    assert evaluate(config, workdir)["fid"] == expected["fid"]
    assert statistics_lines(caplog) == [
        f"statistics of the data: {path}, which names no training images"
    ]
    config.data.dataset, config.data.path = "folder", str(tmp_path / "images.npy")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.save(config.data.path, images)
    path.rename(tmp_path / "stats/folder_8_stats.npz")
    with pytest.raises(ValueError, match="folder_8_stats.npz holds statistics of other data"):
        evaluate(config, workdir)


def test_what_published_statistics_do_not_say_is_said(workdir, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "stats").mkdir()
    path = tmp_path / "stats/digits_8_stats.npz"
    np.savez(path, mu=np.ones(64), sigma=np.eye(64, dtype=np.float32))
    evaluate(tiny(tmp_path, enable_bpd=False), workdir)
    ends = "which names no training images, nor its feature space, image size, digest"
    assert statistics_lines(caplog) == [f"statistics of the data: {path}, {ends}"]


@pytest.mark.parametrize("dtype", [">f8", ">f4", "f2", "g", ">g"])
def test_statistics_of_any_floats_are_read(dtype, workdir, tmp_path):
    config = tiny(tmp_path, enable_bpd=False)
    (tmp_path / "stats").mkdir()
    path, chance = tmp_path / "stats/digits_8_stats.npz", np.random.default_rng(0)
    features = chance.random((300, 64)).astype("f2")  # exact in each of these
    np.savez(path, pool_3=features)
    expected = evaluate(config, workdir)
    np.savez(path, pool_3=features.astype(dtype), index=np.array(["text"]), count=np.uint8(44))
    with pytest.raises(ValueError, match="of 300 images, but count is 44"):
        evaluate(config, workdir)
    np.savez(path, pool_3=features.astype(dtype), index=np.array(["no index of ours"]))
    for name in ("fid", "kid", "precision", "recall"):
        assert evaluate(config, workdir)[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("dtype", ["i1", "u1", ">i2", "u8"])
def test_indices_of_any_integers_are_those_of_images(dtype, workdir, tmp_path):
    config = tiny(tmp_path, enable_bpd=False)
    evaluate(config, workdir)
    (path,) = (tmp_path / "stats").iterdir()
    pictures = [workdir / f"eval/{name}_4.png" for name in ("nearest", "data_images")]
    statistics = read_arrays(path)
    # numbers of images, small enough for eight bits of either sign
    statistics["index"] %= 120
    expected = []
    for index in (statistics["index"], statistics["index"].astype(dtype)):
        files.save_npz(path, **(statistics | {"index": index}))
        evaluate(config, workdir)
        expected.append([np.asarray(Image.open(each)) for each in pictures])
    for one, other in zip(*expected, strict=True):
        np.testing.assert_array_equal(one, other)
    for wrong in (statistics["index"] + 10**6, statistics["index"] - 10**3):
        files.save_npz(path, **(statistics | {"index": wrong}))
        with pytest.raises(ValueError, match="index has numbers that none of 1617 images has"):
            evaluate(config, workdir)
    for wrong in (statistics["index"][:5], statistics["index"] * 1.0, statistics["index"] > 9):
        files.save_npz(path, **(statistics | {"index": wrong}))
        with pytest.raises(ValueError, match=r"index is .*, not int or uint \(1617,\)"):
            evaluate(config, workdir)


def test_a_cached_file_of_another_kind_is_not_written_over(workdir, tmp_path):
    config = tiny(tmp_path, enable_bpd=False)
    evaluate(config, workdir)
    (path,) = (tmp_path / "stats").iterdir()
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not an array file"):
        evaluate(config, workdir)
    assert path.read_bytes() == b"something else"


def test_few_samples_are_told_how_many_are_needed(workdir, tmp_path, caplog):
    evaluate(tiny(tmp_path, enable_bpd=False, num_samples=64), workdir)
    assert "eval.num_samples=64 is too few for a covariance of 64 features" in caplog.text
    assert "which needs 65" in caplog.text
    with pytest.raises(ValueError, match="eval.num_samples must be .* from 4 to .*, not 3"):
        evaluate(tiny(tmp_path, num_samples=3), workdir)


# --- a further metric -----------------------------------------------------------------------------


def test_a_further_metric_is_a_function_and_a_line(workdir, tmp_path, monkeypatch, caplog):
    """A registered metric is computed, reported and shown beside the built-in ones."""
    mine = Metric("Mine", better=-1, note="noted", compute=lambda c: 1.5 + len(c.features))
    missing = Metric("Missing", better=1, note="", compute=lambda c: None)
    monkeypatch.setitem(METRICS, "mine", mine)
    monkeypatch.setitem(METRICS, "missing", missing)
    caplog.set_level("INFO")
    report = evaluate(tiny(tmp_path, enable_bpd=False), workdir)
    assert report["mine"] == 231.5
    assert "missing" not in report
    assert "\n  Mine " in caplog.text
    page = (workdir / "eval/report.html").read_text()
    assert "<h3>Mine</h3><p>231.5</p><span>noted</span>" in page
    assert "<th>Mine\u00a0↓</th>" in page
    assert "Missing" not in page


# --- the page -------------------------------------------------------------------------------------


def test_loss_curve_of_a_run_that_was_killed(tmp_path, monkeypatch):
    """A second start goes back to step 4; what the first logged after that is gone."""
    from tensorboardX import SummaryWriter

    now = time.time()
    for start, (first, last, purge) in enumerate([(1, 6, 1), (4, 8, 4)]):
        monkeypatch.setattr(time, "time", lambda later=start: now + later)  # names count seconds
        with SummaryWriter(str(tmp_path), purge_step=purge) as board:
            for step in range(first, last + 1):
                board.add_scalar("loss/train", 10 * purge + step, step)
    expected = [(s, 10 + s) for s in range(1, 4)] + [(s, 40 + s) for s in range(4, 9)]
    assert read_scalars(tmp_path) == {"loss/train": expected}
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:-5])  # a kill while writing
    assert read_scalars(tmp_path) == {"loss/train": expected[:-1]}


def test_page_of_an_evaluation(workdir, tmp_path):
    config = tiny(tmp_path, enable_interpolate=True, enable_rescale=True)
    config.model.name = "ncsnpp"
    save_checkpoints(config, workdir, 4)
    Image.new("RGB", (8, 8)).save(workdir / "film.webp")
    report = evaluate(config, workdir)
    assert "seconds" in report
    origin = json.loads(str(np.load(workdir / "eval/ckpt_4/samples_0.npz")["origin"]))
    assert origin["seed"] == config.seed
    page = (workdir / "eval/report.html").read_text()
    assert page.count("data:image/png;base64,") == 5  # two grids, neighbours, two strips
    assert page.count("data:image/webp;base64,") == 1
    for words in ("Interpolation", "Temperature", "Nearest training images", "Bits/dim"):
        assert words in page
    for fact in ("DDPM++, ", "forward_euler, 3 evaluations", "0.001, ", "<dd>cpu</dd>"):
        assert fact in page
    for link in re.findall(r'<a href="(.*?)"', page):
        assert (workdir / "eval" / link).exists()
    assert f"{report['fid']:#.4g}" in dumped(workdir / "eval/report.html", tmp_path)


def test_data_are_digested_once_for_all_checkpoints(tmp_path, monkeypatch):
    config, folder, calls = tiny(tmp_path, enable_bpd=False, enable_sampling=False), tmp_path, []
    save_checkpoints(config, folder, 1, 2)
    config.eval.update(enable_loss=True, steps="4,2")
    digest = identities.digest_of
    monkeypatch.setattr(identities, "digest_of", lambda data: calls.append(1) or digest(data))
    run_lib.evaluate(config, folder)
    made_by = [json.loads(str(report_of(folder, k)["settings"])) for k in (1, 2)]
    assert len(calls) == 1
    expected = metrics.reference.fingerprint(datasets.get_dataset(config, "test"))
    assert {each["split.digest"] for each in made_by} == {expected}
