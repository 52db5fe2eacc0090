"""Training on the latents of a frozen autoencoder in a file: data.codec=FILE."""

import contextlib
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.datasets import load_digits
from torch import Tensor, nn
from warm_start import run_main

import run_lib
from completion import complete
from configs.vp import digits_ddpmpp
from datasets import Data, Stream, batch_at
from experiment import Experiment, load
from sources import encoded
from sources.autoencoder import Autoencoder
from sources.autoencoder import read as read_autoencoder
from sources.batch import Batch
from sources.latents import LatentArrays
from sources.preparation import Preparation
from storage.checkpoints import load_checkpoint

SIDE, SQUARE, CHANNELS, NUMBER = 28, 4, 5, 200

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Linear(nn.Module):
    """Projection of squares of pixels on their first principal components, in a unit of its own."""

    def __init__(self, basis: Tensor, mean: Tensor):
        super().__init__()
        self.register_buffer("basis", basis)  # (components, pixels)
        self.register_buffer("mean", mean)

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        squares = nn.functional.pixel_unshuffle(x, 4) - self.mean.view(1, -1, 1, 1)
        return 30 * torch.einsum("kp,bphw->bkhw", self.basis, squares) + 7

    @torch.jit.export
    def decode(self, z: Tensor) -> Tensor:
        squares = torch.einsum("kp,bkhw->bphw", self.basis, (z - 7) / 30)
        return nn.functional.pixel_shuffle(squares + self.mean.view(1, -1, 1, 1), 4)


class Part(nn.Module):
    """The encoder or the decoder of an autoencoder, as a module of its own."""

    def __init__(self, module: Linear, part: str):
        super().__init__()
        self.module, self.part = module, part

    def forward(self, x: Tensor) -> Tensor:
        return self.module.encode(x) if self.part == "encode" else self.module.decode(x)


def squares_of(x):
    """Squares (n, 7, 7, 16) of images (n, 28, 28)."""
    per_side = SIDE // SQUARE
    squares = x.reshape(len(x), per_side, SQUARE, per_side, SQUARE).transpose(0, 1, 3, 2, 4)
    return squares.reshape(len(x), per_side, per_side, -1)


def of_squares(squares):
    """The inverse of `squares_of`."""
    n, per_side = squares.shape[:2]
    squares = squares.reshape(n, per_side, per_side, SQUARE, SQUARE).transpose(0, 1, 3, 2, 4)
    return squares.reshape(n, SIDE, SIDE)


def components(x, number=CHANNELS):
    """Mean (16,) and principal components (number, 16) of the squares of images (n, 28, 28)."""
    rows = squares_of(x).reshape(-1, SQUARE**2)
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
    return rows.mean(0), vectors.T[np.argsort(-values)[:number]]


def projected(x):
    """Images (n, 28, 28) whose squares are projected on their principal components."""
    mean, basis = components(x)
    return of_squares(mean + (squares_of(x) - mean) @ basis.T @ basis)


def linear(x, number=CHANNELS):
    mean, basis = components(x, number)
    return Linear(torch.from_numpy(basis).float(), torch.from_numpy(mean).float())


@pytest.fixture(scope="module")
def digits():
    """The first of scikit-learn's digits, enlarged, uint8 (n, 28, 28)."""
    images = torch.from_numpy(load_digits().images[:NUMBER])[:, None] / 16
    images = nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear").clamp(0, 1)
    return (images * 255).round().byte().numpy()[:, 0]


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """The images, as an array of 8 bits, and two autoencoders of them."""
    folder, x = tmp_path_factory.mktemp("latents"), digits / 127.5 - 1
    np.save(folder / "digits.npy", digits[..., None])
    torch.jit.script(linear(x)).save(folder / "linear.pt")
    torch.jit.script(linear(x, 3)).save(folder / "other.pt")
    return folder


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(folder, **changes):
    config = digits_ddpmpp.get_config()
    values = {
        "data.dataset": "folder",
        "data.path": str(folder / "digits.npy"),
        "data.codec": str(folder / "linear.pt"),
        "data.image_size": SIDE,
        "data.random_flip": True,
        "data.num_workers": 0,
        "model.nf": 8,
        "model.ch_mult": (1,),
        "model.num_res_blocks": 1,
        "model.attn_resolutions": (),
        "training.n_iters": 20,
        "training.batch_size": 32,
        "training.snapshot_freq": 10,
        "training.snapshot_freq_for_preemption": 10,
        "training.snapshot_sampling": False,
        "training.eval_freq": 20,
        "optim.warmup": 0,
        "sampling.method": "ode",
        "sampling.ode_solver": "heun",
        "sampling.N": 3,
        "eval.enable_bpd": False,
        "eval.num_samples": 20,
        "eval.batch_size": 20,
        "eval.stats_dir": str(folder / "stats"),
        "device": "cpu",
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    with config.ignore_type():
        config.update_from_flattened_dict(values)
    return config


def built(folder, **changes):
    config, data, _ = complete(tiny(folder, **changes))
    return Experiment.build(config, data)


def mistake(call, *arguments):
    """The line of the ValueError that a call raises."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextlib.contextmanager
def counting(folder):
    """Within the block caches are in `folder`; the numbers of images that are encoded together."""
    numbers, encode = [], Autoencoder.encode

    def counted(self, x):
        numbers.append(len(x))
        return encode(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(Autoencoder, "encode", counted)
        yield numbers


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A workdir that was trained for 20 steps, with a cache of its own, and what it encoded."""
    workdir = tmp_path_factory.mktemp("run")
    with counting(workdir / "cache") as encodings:
        assert run_lib.train(tiny(folder), workdir)
    return workdir, encodings


# --- the codec ------------------------------------------------------------------------------------


def test_decoded_latents_are_the_projection_and_their_scale_is_measured(folder, digits):
    codec = built(folder).codec
    assert codec.shape == (CHANNELS, SIDE // SQUARE, SIDE // SQUARE)
    assert codec.data_shape == (1, SIDE, SIDE) and codec.dtype == "uint8"
    x = codec.encode(codec.units(torch.from_numpy(digits)[:, None]))
    expected = (projected(digits / 127.5 - 1) + 1) / 2
    np.testing.assert_allclose(codec.unclamped(x)[:, 0], expected, atol=1e-4)
    np.testing.assert_allclose(codec.decode(x)[:, 0], expected.clip(0, 1), atol=1e-4)

    train = Data(tiny(folder, data__codec="").data).get("train")
    both = torch.cat([train, train.flip(-1)])
    x = codec.encode(codec.units(both)).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(1, correction=0), torch.full_like(x[:, 0], 0.5))


def test_arrays_in_units_of_their_own(folder, tmp_path):
    """The autoencoder sees arrays as the network would: with mean 0 and deviation 0.5."""
    random = np.random.default_rng(0)
    arrays = random.normal(40, 9, (60, SIDE, SIDE)) + np.linspace(0, 99, SIDE)
    arrays = arrays.astype(np.float32)
    np.save(tmp_path / "x.npy", arrays[..., None])
    train = Data(tiny(folder, data__path=str(tmp_path / "x.npy"), data__codec="").data).get("train")
    mean, std = train.double().mean().item(), train.double().std(correction=0).item()
    x = (arrays.astype(np.float64) - mean) / (2 * std)
    torch.jit.script(linear(x)).save(tmp_path / "linear.pt")
    changes = {"data__path": str(tmp_path / "x.npy"), "data__codec": str(tmp_path / "linear.pt")}
    codec = built(folder, **changes).codec
    assert isinstance(codec, LatentArrays) and codec.dtype == "float32"
    data = codec.units(torch.from_numpy(arrays)[:, None])
    decoded = codec.decode(codec.encode(data))[:, 0]
    np.testing.assert_allclose(decoded, projected(x) * 2 * std + mean, atol=1e-2)
    comparable = codec.comparable(data)[:, 0]  # distances are of arrays, not of latents
    np.testing.assert_allclose(comparable, x, atol=1e-5)


def test_two_exported_programs(folder, digits, tmp_path):
    module = linear(digits / 127.5 - 1)
    for part, shape in (("encode", (2, 1, SIDE, SIDE)), ("decode", (2, CHANNELS, 7, 7))):
        batch = {"x": {0: torch.export.Dim("batch", min=2)}}
        program = torch.export.export(
            Part(module, part), (torch.zeros(shape),), dynamic_shapes=batch
        )
        torch.export.save(program, tmp_path / f"{part}.pt2")
    name = f"{tmp_path / 'encode.pt2'}, {tmp_path / 'decode.pt2'}"
    exported = read_autoencoder(name, (1, SIDE, SIDE))
    for number in (1, 3):
        x = torch.from_numpy(digits[:number])[:, None] / 127.5 - 1
        decoded = exported.decode(exported.encode(x))[:, 0]
        np.testing.assert_allclose(decoded, projected(digits / 127.5 - 1)[:number], atol=1e-4)
    assert exported.digest != read_autoencoder(str(folder / "linear.pt"), (1, SIDE, SIDE)).digest
    for one in (tmp_path / "encode.pt2", f"{name},x.pt2"):
        (tmp_path / "x.pt2").touch()
        assert "ENCODER.pt2,DECODER.pt2" in mistake(
            Autoencoder, str(one).replace("x.pt2", str(tmp_path / "x.pt2")), (1, SIDE, SIDE)
        )


@pytest.mark.parametrize("stored", [True, False])
def test_the_codec_of_a_guide_is_told_by_its_content(folder, run, tmp_path, monkeypatch, stored):
    """The same file under another name is the same codec; other content under one name is not."""
    for name, source in {"same.pt": "linear.pt", "changing.pt": "linear.pt"}.items():
        (tmp_path / name).write_bytes((folder / source).read_bytes())
    content = load_checkpoint(run[0] / "checkpoints/checkpoint_20.pth")
    content["config"] |= {"data.codec": str(tmp_path / "changing.pt")}
    if not stored:  # a run of an older program
        del content["codec"]
    monkeypatch.setattr("experiment.open_checkpoint", lambda path, intact: content)
    guide = {"sampling__guide": str(tmp_path / "guide.pth"), "sampling__guidance": 2.0}
    monkeypatch.chdir(tmp_path)
    built(folder, data__codec="./same.pt", **guide)
    (tmp_path / "changing.pt").write_bytes((folder / "other.pt").read_bytes())
    if stored:
        built(folder, data__codec="./same.pt", **guide)
    codec = "./changing.pt" if stored else "./same.pt"
    assert "has the codec" in mistake(lambda: built(folder, data__codec=codec, **guide))


# --- encoded once ---------------------------------------------------------------------------------


def test_images_are_encoded_once(folder, run):
    workdir, encodings = run
    train = len(Data(tiny(folder).data).get("train"))
    assert sorted(encodings) == [NUMBER - train, train, train]  # of a held-out loss; mirrored too
    assert len([*workdir.glob("cache/pfgm/latents-*.npy")]) == 1


def test_a_step_sees_what_it_would_encode_itself(folder):
    """Rows 2 i are of image i, rows 2 i + 1 of its mirror image, with the labels of the image."""
    labels = np.arange(NUMBER) % 7
    np.savez(folder / "labelled.npz", images=np.load(folder / "digits.npy"), labels=labels)
    labelled = {"data__path": str(folder / "labelled.npz"), "data__num_classes": 7}
    for resident in (2**31, 200_000):  # bytes; the latents take 352,800, the images fewer
        experiment = built(folder, **labelled, data__resident_bytes=resident)
        images = experiment.data.get("train")
        latents, prepare = experiment.training_set(images)
        assert isinstance(latents, Stream) == (resident < 2**31)
        assert len(latents) == 2 * len(images)
        rows = torch.tensor([0, 1, 10, 11])
        batch, stored = batch_at(latents, rows), batch_at(images, rows // 2)
        assert batch.labels.tolist() == stored.labels.tolist()
        mirrored = (rows % 2 == 1).view(-1, 1, 1, 1)
        pictures = torch.where(mirrored, stored.images.flip(-1), stored.images)
        x = Preparation(experiment.codec)(Batch(pictures), torch.Generator()).images
        torch.testing.assert_close(prepare(batch, torch.Generator()).images, x)


def test_the_prior_of_field_matching_is_encoded_once(folder, digits, tmp_path):
    np.save(tmp_path / "prior.npy", digits[:30, ..., None])
    prior = {"data__prior_dataset": "folder", "data__prior_path": str(tmp_path / "prior.npy")}
    options = {"training__sde": "efm", "sampling__method": "field_lines", "data__held_out": 0}
    with counting(tmp_path / "cache") as encodings:
        experiment = built(folder, **prior, **options)
        encodings.clear()
        images, seed = experiment.method.prior, torch.Generator().manual_seed
        examples = [images.spread(40, seed(i), "cpu") for i in (1, 2)]
        assert encodings == [30]
        draws = images.draw(4, seed(3), "cpu")
        assert encodings == [30, 4]  # a few samples do not encode the whole prior
    x = torch.from_numpy(digits[:30, None])
    expected = experiment.codec.encode(experiment.codec.units(x)).flatten(1).double()
    for each in examples:
        distances = torch.cdist(each.flatten(1).double(), expected)
        assert distances.amin(1).max() < 1e-3
        times = distances.argmin(1).bincount(minlength=30)
        assert times.min() == 1 and times.max() == 2
    assert torch.cdist(draws.flatten(1).double(), expected).amin(1).max() < 1e-3


def test_a_cache_that_cannot_be_used_costs_time_only(folder, tmp_path, caplog, monkeypatch):
    experiment = built(folder)
    images = experiment.data.get("train")
    arguments = images, experiment.codec, False
    whole = encoded.encoded_once(*arguments, tmp_path / "a/latents.npy", "cpu").whole()
    content = (tmp_path / "a/latents.npy").read_bytes()
    (tmp_path / "a/latents.npy").write_bytes(content[:-9])  # written by a disk that was full
    again = encoded.encoded_once(*arguments, tmp_path / "a/latents.npy", "cpu")
    assert (again.whole() == whole).all()
    (tmp_path / "b").write_text("no folder")
    in_memory = encoded.encoded_once(*arguments, tmp_path / "b/latents.npy", "cpu")
    assert (in_memory == whole).all()
    assert caplog.text.count("latents are held in memory, and computed again") == 1


def test_a_run_resumes_bit_for_bit(folder, run, tmp_path, monkeypatch):
    step, calls = run_lib.train_step, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 13:  # after the state of step 10 is saved
            raise KeyboardInterrupt
        return step(*arguments)

    with counting(run[0] / "cache") as encodings:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run_lib, "train_step", killed)
            run_lib.train(tiny(folder), tmp_path)
        assert run_lib.train(tiny(folder), tmp_path)
    assert max(encodings) < 32  # held-out images alone
    whole, halves = (
        load_checkpoint(workdir / "checkpoints/checkpoint_20.pth") for workdir in (run[0], tmp_path)
    )
    for part in ("model", "ema"):
        torch.testing.assert_close(whole[part], halves[part], rtol=0, atol=0)


# --- the program ----------------------------------------------------------------------------------


def test_evaluation_is_of_decoded_images(folder, run):
    workdir, _ = run
    run_lib.evaluate(tiny(folder), workdir)
    with np.load(next((workdir / "eval").glob("ckpt_*/samples_*.npz"))) as file:
        samples = file["samples"]
    assert samples.shape == (20, SIDE, SIDE, 1) and samples.dtype == np.uint8
    images = np.load(folder / "digits.npy")[..., 0] / 127.5 - 1
    mean, basis = components(images)
    rest = squares_of(samples[..., 0] / 127.5 - 1) - mean
    rest = rest - rest @ basis.T @ basis  # 0 but for rounding and clamping to black and white
    assert np.median(np.abs(rest)) < 0.02
    with np.load(next((workdir / "eval").glob("report_*.npz"))) as report:
        assert np.isfinite([report["fid"], report["loss"]]).all()


def test_samples_and_films(folder, run, tmp_path):
    flags = ["--mode", "sample", "--workdir", run[0], f"--outdir={tmp_path}"]
    flags += ["--config.sampling.seeds=0-3", "--config.sampling.film=True"]
    codec = f"--config.data.codec={folder / 'linear.pt'}"
    run_main([*flags, codec])
    with np.load(tmp_path / "film.npz") as film, np.load(tmp_path / "samples.npz") as file:
        assert (film["frames"][-1] == file["samples"]).all()
        assert file["samples"].shape == (4, SIDE, SIDE, 1)
    error = run_main(flags, expect=2).stderr  # a workdir may be a stranger's
    assert codec in error and "Traceback" not in error


def test_what_latents_do_not_have_is_one_line(folder, run):
    workdir, codec = run[0], {"data.codec": str(folder / "linear.pt")}
    assert "data.codec" in mistake(load, workdir)
    other = mistake(load, workdir, {"data.codec": str(folder / "other.pt")})
    assert "5 and 5 numbers for 3 channels" in other or "was trained with the codec" in other
    trained = load(workdir, codec)
    images = torch.rand(2, 1, SIDE, SIDE)
    assert trained.decode(trained.encode(images)).shape == images.shape
    assert "no likelihood" in mistake(trained.log_likelihood, images)
    assert "denoises latents" in mistake(trained.denoise, images, 1.0)
    assert "sees latents" in mistake(trained.restore, images[..., ::2, ::2], "super2")
    bits = tiny(folder, eval__enable_bpd=True)
    assert "eval.enable_bpd" in mistake(run_lib.evaluate, bits, workdir, "bits")
    sized = mistake(load, workdir, codec | {"sampling.size": (56, 56)})
    assert sized.startswith("sampling.size is for images")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data__patch", (8, 8)),
        ("data__uniform_dequantization", True),
        ("data__condition_path", "digits.npy"),
        ("data__conditions", "image"),
        ("training__augment", 0.1),
    ],
)
def test_options_that_change_images_are_refused(folder, key, value):
    value = str(folder / value) if value == "digits.npy" else value
    assert mistake(complete, tiny(folder, **{key: value})).startswith(key.replace("__", "."))


# --- files that are none --------------------------------------------------------------------------


class Wrong(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        if self.kind == "nan":
            return x[:, :, ::2, ::2] + float("nan")
        if self.kind == "shape" and bool((x != 0).any()):
            return x[:, :, ::4, ::4]
        if self.kind == "fails":
            return x.view(3, 5)
        return x.flatten(1) if self.kind == "flat" else x[:, :, ::2, ::2]

    @torch.jit.export
    def decode(self, z: Tensor) -> Tensor:
        return z if self.kind == "decoded" else z.repeat(1, 1, 2, 2)


class EncodesOnly(nn.Module):
    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("shape", r"encode gives \(\d+, 1, 7, 7\) for \(\d+, 1, 28, 28\), not \(\d+, 1, 14, 14\)"),
        ("flat", r"encode gives \(1, 784\) for .*, not latents"),
        ("decoded", r"decode gives \(1, 1, 14, 14\) for .*, not \(1, 1, 28, 28\)"),
        ("fails", r"encode fails for \(1, 1, 28, 28\): "),
        ("half", r" is a TorchScript module without the method decode"),
        ("text", r" is not a TorchScript module, nor a program of torch.export: "),
        ("missing", r"No such file or directory"),
    ],
)
def test_what_is_no_autoencoder_is_one_line(folder, tmp_path, kind, reason):
    path = tmp_path / "wrong.pt"
    if kind == "text":
        path.write_text("no program")
    elif kind == "half":
        torch.jit.script(EncodesOnly()).save(path)
    elif kind != "missing":
        torch.jit.script(Wrong(kind)).save(path)
    line = mistake(complete, tiny(folder, data__codec=str(path)))
    assert line.startswith(f"data.codec={path}") and re.search(reason, line)


def test_latents_that_are_not_finite_are_refused(folder, tmp_path):
    torch.jit.script(Wrong("nan")).save(tmp_path / "wrong.pt")
    config = tiny(folder, data__codec=str(tmp_path / "wrong.pt"))
    assert "not finite" in mistake(complete, config)


# --- docs/data.md ---------------------------------------------------------------------------------


def test_the_page_exports_an_autoencoder(tmp_path, monkeypatch):
    page = (ROOT / "docs/data.md").read_text()
    section = page.partition("## Latents of an autoencoder\n")[2].partition("\n## ")[0]
    code = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    Path("export.py").write_text("".join(code[:2]))  # TorchScript reads the source
    runpy.run_path("export.py", run_name="__main__")
    shape = (3, 32, 32)
    whole = read_autoencoder("autoencoder.pt", shape)
    parts = read_autoencoder("encoder.pt2,decoder.pt2", shape)
    x = torch.rand(3, *shape)
    torch.testing.assert_close(whole.encode(x), parts.encode(x))
    torch.testing.assert_close(whole.decode(whole.encode(x)), parts.decode(parts.encode(x)))
