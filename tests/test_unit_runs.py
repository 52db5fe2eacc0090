"""Whole runs of main.py on arrays in their own units: training, evaluation, sampling."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from warm_start import run_main

from experiment import load
from likelihood import log_likelihood, rademacher
from sources.keyed import keyed_generator
from storage.checkpoints import load_checkpoint

TINY = {
    "data.dataset": "folder",
    "data.image_size": 0,
    "data.num_channels": 0,
    "training.n_iters": 20,
    "training.batch_size": 16,
    "training.small_batch_size": 8,
    "training.snapshot_freq": 20,
    "training.eval_freq": 20,
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (),
    "sampling.N": 3,
    "sampling.rtol": 0.3,
    "sampling.atol": 0.3,
    "eval.batch_size": 10,
    "eval.num_samples": 10,
    "eval.bpd_num_repeats": 1,
}


def call(mode, workdir, *arguments, expect=0, processes=1, **values):
    overrides = [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]
    base = ["--mode", mode, "--workdir", workdir, *arguments]
    if mode == "train":
        base += ["--config", ROOT / "configs/pfgmpp/digits_demo.py"]
        overrides = [f"--config.{key}={value}" for key, value in TINY.items()] + overrides
    overrides.append(f"--config.eval.stats_dir={workdir}/stats")
    return run_main([*base, *overrides], expect, processes)


def array(dtype, shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape) * 30 + 100
    return values > 100 if dtype == "bool" else values.astype(dtype)


# type, shape of a file, layout, and shape of a sample (H, W, C)
KINDS = {
    "float32 (n, H, W, C)": ("float32", (40, 6, 10, 3), "nhwc", (6, 10, 3)),
    "uint16 (n, H, W)": ("uint16", (40, 8, 8), "nhwc", (8, 8, 1)),
    "int8 (n, C, H, W)": ("int8", (40, 2, 8, 8), "nchw", (8, 8, 2)),
    "float64 (n, L)": ("float64", (40, 12), "nhwc", (1, 12, 1)),
    "float16 (n, L, C)": ("float16", (40, 16, 5), "nlc", (1, 16, 5)),
    "int32 (n, C, L)": ("int32", (40, 2, 16), "ncl", (1, 16, 2)),
    "bool (n, H, W)": ("bool", (40, 8, 8), "nhwc", (8, 8, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_each_kind_of_arrays(tmp_path, kind):
    """Samples have the type, the units and the sides of the data; likelihoods are nats."""
    dtype, shape, layout, sample_shape = KINDS[kind]
    data, run = array(dtype, shape), tmp_path / "run"
    name = "x.npz" if dtype in ("int8", "bool") else "x.npy"
    (np.savez if name == "x.npz" else np.save)(tmp_path / name, data)
    where = {"data__path": tmp_path / name, "data__layout": layout}
    output = call("train", run, **where, reports__unit="HU").stdout
    assert f"arrays of {dtype}: channels have mean" in output
    with np.load(run / "samples/iter_20/sample.npz") as file:
        assert file["samples"].dtype == dtype and file["samples"].shape[1:] == sample_shape
    output = call("eval", run).stdout
    assert "Nats per entry (test)" in output and "Bits/dim" not in output
    with np.load(run / "eval/report_1.npz") as report:
        assert np.isfinite([report[key] for key in ("loss", "fid", "nats", "nats_error")]).all()
        assert len(report["nats_images"]) == 4 and "bpd" not in report
    page = (run / "eval/report.html").read_text()
    assert "Negative log-likelihoods, in nats per entry" in page and " HU</span>" in page
    height, width, channels = sample_shape
    sides = f"{height} × {width}" if height != width else f"{height} × {height}"
    assert sides in page and f"samples, {dtype} (n, H, W, C)" in page
    encode = tmp_path / "two.npy"
    np.save(encode, data[:2])
    call(
        "sample", run, "--outdir", tmp_path / "out",
        sampling__seeds="0-3", sampling__film=True, sampling__encode=encode,
    )  # fmt: skip
    with np.load(tmp_path / "out/samples.npz") as file:
        samples = file["samples"]
    assert samples.dtype == dtype and samples.shape == (4, *sample_shape)
    for i in range(4):
        with np.load(tmp_path / f"out/{i:06d}.npz") as file:
            assert (file["sample"] == samples[i]).all()
    if dtype != "bool":
        means, centre = samples.astype(float).mean((0, 1, 2)), data.astype(float).mean()
        assert (np.abs(means - centre) < 4 * data.astype(float).std()).all()
    with np.load(tmp_path / "out/encoded.npz") as file:
        assert file["decoded"].dtype == dtype and np.isfinite(file["nats"]).all()
    with Image.open(tmp_path / "out/film.webp") as film:
        assert film.n_frames > 1


@pytest.mark.slow
def test_the_library_on_arrays(tmp_path):
    data, run = array("uint16", (40, 8, 8, 2)), tmp_path / "run"
    np.save(tmp_path / "x.npy", data)
    call("train", run, data__path=tmp_path / "x.npy")
    trained = load(run, {"sampling.rtol": 1e-4, "sampling.atol": 1e-4})
    codec, method = trained.experiment.codec, trained.experiment.method
    samples = trained.sample([0, 1])
    assert samples.dtype == torch.float64 and samples.shape == (2, 2, 8, 8)
    assert codec.stored(samples).dtype == np.uint16
    x, std = torch.from_numpy(data[:3].astype(float)).permute(0, 3, 1, 2), data.std()
    back = trained.decode(trained.encode(x))
    assert back.dtype == torch.float64 and (back - x).abs().max() < 0.01 * std
    nats = -trained.log_likelihood(x) / 128
    torch.testing.assert_close(trained.bits_per_dim(x), nats)
    # the density in units of the data is that of x, times the 0.5 / std of each entry
    probes = rademacher(codec.encode(x), keyed_generator("cpu", "probe", 0))
    log_p, *_ = log_likelihood(
        method, trained.experiment.network, codec.encode(x), probes, rtol=1e-4, atol=1e-4
    )
    expected = -log_p / 128 - np.mean(np.log(0.5 / np.array(codec.std)))
    torch.testing.assert_close(nats.double(), expected.double(), rtol=1e-4, atol=1e-4)
    denoised = trained.denoise(x, 0.1)  # a tenth of a channel's standard deviation
    expected = codec.unclamped(method.denoise(trained.experiment.network, codec.encode(x), 0.05))
    torch.testing.assert_close(denoised, expected)
    missing = torch.zeros(8, 8, dtype=torch.bool)
    missing[:4] = True
    restored = trained.restore(x, "inpaint", [0], missing=missing)
    assert (restored[:, 0, :, 4:] - x[:, :, 4:]).abs().max() < 1e-3
    for mistake in (x.masked_fill(x > 100, torch.nan), x / 0):
        with pytest.raises(ValueError, match="arrays must be finite"):
            trained.encode(mistake)
    with pytest.raises(ValueError, match="'colour' is for images of 8 bits"):
        trained.restore(x[:, :1], "colour", [0])
    frames = trained.film([0], frames=3)
    assert frames.dtype == torch.uint8 and frames.shape == (3, 1, 2, 8, 8)


@pytest.mark.slow
def test_processes_share_arrays_on_disk(tmp_path):
    """The weights are those of one process, also for types that gloo does not know.

    RAdam's first five steps are plain momentum, so that rounding stays rounding.
    """
    np.save(tmp_path / "x.npy", array("int16", (40, 8, 8)))
    values = {"data__path": tmp_path / "x.npy", "data__resident_bytes": 0}
    values |= {"optim__optimizer": "RAdam", "training__precision": "fp32"}
    values |= {"training__n_iters": 5, "training__snapshot_freq": 5, "training__eval_freq": 5}
    weights = {}
    for processes in (1, 2):
        run = tmp_path / f"run_{processes}"
        call("train", run, processes=processes, training__snapshot_sampling=False, **values)
        weights[processes] = load_checkpoint(run / "checkpoints/checkpoint_5.pth")["model"]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[2][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_arrays_that_are_given_must_fit(tmp_path):
    data, run = array("int16", (40, 8, 8, 2)), tmp_path / "run"
    np.save(tmp_path / "x.npy", data)
    call("train", run, data__path=tmp_path / "x.npy", training__n_iters=1)
    np.save(tmp_path / "wide.npy", data[:, :, :4])
    np.save(tmp_path / "nan.npy", np.where(data[:1] > 100, np.nan, data[:1]))
    (tmp_path / "x.png").write_bytes(b"no array")
    for name, says in {
        "wide.npy": "must hold arrays of the shape (8, 8, 2) (H, W, C)",
        "nan.npy": "is nan: replace what is not finite",
        "x.png": "arrays are given as an .npy or .npz",
    }.items():
        done = call(
            "sample", run, "--outdir", tmp_path / "out", expect=2,
            sampling__encode=tmp_path / name,
        )  # fmt: skip
        assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_classes_and_restorations_of_arrays(tmp_path):
    data, run = array("float32", (40, 8, 8, 2)), tmp_path / "run"
    np.savez(tmp_path / "x.npz", images=data, labels=np.arange(40) % 2)
    call("train", run, data__path=tmp_path / "x.npz", data__num_classes=-1)
    restore = {"sampling__restore": "inpaint", "sampling__restore_mask": "0,0,4,8"}
    call(
        "eval", run, eval__enable_classification=True, eval__enable_sampling=True,
        eval__num_samples=20, sampling__restore_degrade=True, **restore,
    )  # fmt: skip
    with np.load(run / "eval/report_1.npz") as report:
        assert report["class_log_p"].shape == (4, 2)
        np.testing.assert_allclose(np.exp(report["class_log_p"]).sum(1), 1, rtol=1e-5)
        keys = ("restore_psnr", "restore_psnr_mean", "restore_psnr_plain", "restore_spread")
        assert np.isfinite([report[key] for key in keys]).all()
    with np.load(run / "eval/ckpt_1_restored_0.npz") as file:
        assert file["restored"].dtype == np.float32 and file["restored"].shape[1:] == (8, 8, 2)
    np.save(tmp_path / "two.npy", data[:2])
    out = tmp_path / "out"
    restore["sampling__restore_path"] = tmp_path / "two.npy"
    call("sample", run, "--outdir", out, sampling__seeds="0-3", sampling__class_label=1, **restore)
    with np.load(out / "samples.npz") as file:
        known_pixels, expected = file["samples"][:, 4:], data[[0, 1, 0, 1], 4:]
        assert np.abs(known_pixels - expected).max() < 1e-4 * data.std()  # float32 rounds x
