"""`--mode sample` and `--mode export`: their files, resuming, and refused options."""

import contextlib
import json
import logging
import random
import shutil
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from many_lives import OVERRIDES
from PIL import Image
from sklearn.datasets import load_digits
from test_configs import load as load_config
from warm_start import run_main

import run_lib
from configs.keys import flatten
from experiment import Trained, load
from library import training_run
from models.weights import load_ema
from reports.films import HOLD, check_writer, save_film
from reports.images import image_grid
from storage import run_config, shared_files
from storage.checkpoints import fit, load_checkpoint
from storage.shared_files import save_shared
from storage.stored_tensors import StoredTensor

DIGITS = np.uint8(load_digits().images[:4] / 16 * 255)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir after a few steps of a class-conditional run, whose sampler is a quick one."""
    workdir = tmp_path_factory.mktemp("trained")
    config = load_config("edm/digits_ddpmpp.py")
    changes = {"training.n_iters": 12, "data.num_classes": 10, "sampling.N": 4}
    config.update_from_flattened_dict(OVERRIDES | changes | {"sampling.ode_solver": "heun"})
    assert run_lib.train(config, workdir)
    return workdir


def sample(workdir, outdir=None, **overrides):
    config = run_config.load(workdir)
    config.update_from_flattened_dict({f"sampling.{k}": v for k, v in overrides.items()})
    run_lib.sample(config, workdir, outdir)


def tree(folder):
    """{path: its time of change} of all files but logs and locks."""
    names = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".txt", ".lock")]
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in names}


@pytest.fixture
def no_drawing(monkeypatch):
    def fail(*arguments):
        raise AssertionError("drawn again")

    monkeypatch.setattr(Trained, "_batches", fail)
    monkeypatch.setattr(Trained, "_in_batches", fail)


# --- samples --------------------------------------------------------------------------------------


def test_the_files_of_samples(trained, tmp_path, request):
    sample(trained, tmp_path, seeds="3,0-1", film=True)
    names = {f"{seed:06d}.png" for seed in (0, 1, 3)} | {"grid.png", "film.npz", "film.webp"}
    assert {p.name for p in tmp_path.glob("*")} == names | {"samples.npz", "settings.json"}
    run = load(trained)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["seeds"].tolist() == [3, 0, 1]
        assert file["labels"].tolist() == run.labels(None, 3, [3, 0, 1]).tolist()
        images = file["samples"]
    expected = (run.sample([3, 0, 1])[:, 0] * 255).round().numpy()
    for seed, image, truth in zip((3, 0, 1), images[..., 0], expected, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(tmp_path / f"{seed:06d}.png")))
        assert np.abs(image - truth).max() <= 1
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), image_grid(images))
    with Image.open(tmp_path / "film.webp") as film:
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB"))
    assert np.abs(last - image_grid(images).astype(int)).mean() < 4  # WebP loses little

    before = tree(tmp_path)
    request.getfixturevalue("no_drawing")
    sample(trained, tmp_path, seeds="3,0-1", film=True)
    sample(trained, tmp_path, seeds="1,3")
    sample_files = [name for name in before if name.stem.isdecimal() or name.name == "film.npz"]
    assert len(sample_files) == 4
    assert all(tree(tmp_path)[name] == before[name] for name in sample_files)


def test_other_settings_do_not_mix(trained, tmp_path):
    sample(trained, tmp_path / "a", seeds="0")
    before = tree(tmp_path)
    for overrides, says in [
        ({"N": 5}, r"other settings \(sampling.N: 4 -> 5\): name another folder as --outdir"),
        ({"class_label": 3}, r"sampling.class_label: -1 -> 3"),
    ]:
        with pytest.raises(ValueError, match=says):
            sample(trained, tmp_path / "a", seeds="0-1", **overrides)
    earlier = run_config.load(trained)
    with pytest.raises(ValueError, match=r"other settings \(weights: '"):
        run_lib.sample(earlier, trained, tmp_path / "a", trained / "checkpoints/checkpoint_5.pth")
    assert tree(tmp_path) == before
    (tmp_path / "a/settings.json").write_text("[")
    with pytest.raises(ValueError, match=r"settings.json is damaged"):
        sample(trained, tmp_path / "a", seeds="0")
    (tmp_path / "a/settings.json").unlink()
    with pytest.raises(ValueError, match=r"not known what .*000000.png is a sample of"):
        sample(trained, tmp_path / "a", seeds="0")


def test_two_processes_draw_what_one_draws(trained, tmp_path):
    """Samples of seeds 0 to 31 agree within a grey level, and their class labels exactly."""
    flags = ["--mode=sample", f"--workdir={trained}", "--config.sampling.seeds=0-31"]
    flags += ["--config.eval.batch_size=5", f"--outdir={tmp_path / 'two'}"]
    run_main(flags, processes=2)
    sample(trained, tmp_path / "one", seeds="0-31")
    one, two = (dict(np.load(tmp_path / name / "samples.npz")) for name in ("one", "two"))
    assert one["labels"].tolist() == two["labels"].tolist()
    assert one["samples"].shape == (32, 8, 8, 1)
    assert np.abs(one["samples"].astype(int) - two["samples"]).max() <= 1
    assert (trained / "stdout.txt").read_text().count("32 samples, 0 of which were there") == 1


def test_restorations_by_seed(trained, tmp_path):
    """Seed s restores image number s modulo their number; its known pixels stay."""
    for name, image in enumerate(DIGITS[:2]):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    options = {"restore": "inpaint", "restore_mask": "0,0,8,4", "restorer": "pigdm"}
    sample(trained, tmp_path / "out", seeds="0-4", restore_path=str(tmp_path), **options)
    with np.load(tmp_path / "out/samples.npz") as file:
        images = file["samples"][..., 0]
        assert file["labels"].tolist() == [-1] * 5
    for seed, image in enumerate(images):
        assert np.array_equal(image[:, 4:], DIGITS[seed % 2][:, 4:])
    assert not np.array_equal(images[0], images[2])


def test_restorations_by_seed_through_their_own_masks(trained, tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :4], masks[1, :, 5:] = True, True
    for k in range(2):
        Image.fromarray(DIGITS[k]).save(tmp_path / f"images/{k}.png")
        Image.fromarray(np.uint8(255 * masks[k])).save(tmp_path / f"masks/{k}.png")
    paths = {f"restore_{k}": str(tmp_path / v) for k, v in (("path", "images"), ("mask", "masks"))}
    sample(trained, tmp_path / "out", seeds="0-4", restore="inpaint", restorer="pigdm", **paths)
    with np.load(tmp_path / "out/samples.npz") as file:
        images = file["samples"][..., 0]
    for seed, image in enumerate(images):
        missing = masks[seed % 2]
        assert np.array_equal(image[~missing], DIGITS[seed % 2][~missing])
        assert not np.array_equal(image[missing], DIGITS[seed % 2][missing])


# --- images that are given ------------------------------------------------------------------------


def test_images_are_encoded_and_come_back(trained, tmp_path, request):
    folder = tmp_path / "given"
    folder.mkdir()
    for i, image in enumerate(DIGITS):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    sample(trained, tmp_path / "out", encode=str(folder))
    assert not list((tmp_path / "out").glob("0*.png"))  # no seeds were asked for
    with np.load(tmp_path / "out/encoded.npz") as file:
        arrays = dict(file)
    assert arrays["names"].tolist() == [f"{i:02d}.png" for i in range(4)]
    assert np.abs(arrays["decoded"][..., 0].astype(int) - DIGITS).max() <= 2
    run = load(trained)
    back = run.decode(torch.from_numpy(arrays["latents"]))[:, 0] * 255
    assert np.abs(back.numpy() - DIGITS).max() <= 2
    assert arrays["bpd"].shape == (4,) and np.isfinite(arrays["bpd"]).all()
    pairs = np.asarray(Image.open(tmp_path / "out/encoded.png"))
    assert np.array_equal(pairs[2:50, 2:50, 0], DIGITS[0].repeat(6, 0).repeat(6, 1))
    request.getfixturevalue("no_drawing")
    sample(trained, tmp_path / "out", encode=str(folder))


def test_a_film_between_two_images(trained, tmp_path):
    for i in (0, 3):
        Image.fromarray(DIGITS[i]).save(tmp_path / f"{i}.png")
    ends = f"{tmp_path}/0.png,{tmp_path}/3.png"
    sample(trained, tmp_path / "out", between=ends, film_format="gif")
    with np.load(tmp_path / "out/between.npz") as file:
        frames = file["frames"][..., 0].astype(int)
    assert np.abs(frames[0] - DIGITS[0]).max() <= 2
    assert np.abs(frames[-1] - DIGITS[3]).max() <= 2
    with Image.open(tmp_path / "out/between.gif") as film:
        assert 10 < film.n_frames <= len(frames)


# --- films ----------------------------------------------------------------------------------------


def test_ffmpeg_is_given_every_frame(tmp_path, monkeypatch):
    """A stand-in for ffmpeg records its input; sides are made even, and the last frame stays."""
    script = tmp_path / "ffmpeg"
    script.write_text('#!/bin/sh\necho "$@" > "$0.args"\nfor out; do :; done\n/bin/cat > "$out"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    save_film(tmp_path / "film.mp4", list(frames))
    video = np.frombuffer((tmp_path / "film.mp4").read_bytes(), np.uint8)
    video = video.reshape(2 + HOLD, 6, 4, 3)
    assert np.array_equal(video[:3, :5], frames)
    assert (video[3:] == video[2]).all()
    assert "-s 4x6 " in Path(f"{script}.args").read_text()
    script.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    with pytest.raises(OSError, match=r"ffmpeg: no space left.*film.mp4"):
        save_film(tmp_path / "film.mp4", list(frames))
    assert len(list(tmp_path.glob("*film*"))) == 1


# --- one file to share ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(trained, tmp_path_factory):
    """The run's shared file, moved to another folder."""
    folder = tmp_path_factory.mktemp("shared")
    run_lib.export(run_config.load(trained), trained, folder)
    return Path(shutil.move(folder / "model.safetensors", tmp_path_factory.mktemp("moved")))


def test_a_shared_file_draws_the_same(trained, shared):
    original, exported = load(trained), load(shared)
    assert exported.step == 12
    assert torch.equal(original.sample(range(4)), exported.sample(range(4)))
    assert flatten(original.experiment.config) == flatten(exported.experiment.config)


def test_a_shared_file_is_what_the_format_says(shared):
    """Read by the published description alone."""
    content = shared.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, memory = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    assert metadata["data_range"] == "[-1, 1]"
    assert json.loads(metadata["config"])["model.nf"] == 8
    weights = load_checkpoint(shared)["model"]
    assert header.keys() == weights.keys()
    assert sorted(e["data_offsets"][0] for e in header.values())[0] == 0
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind = {"F32": np.float32, "I64": np.int64}[entry["dtype"]]
        array = np.frombuffer(memory[start:end], kind).reshape(entry["shape"])
        assert np.array_equal(array, weights[name].numpy())


def test_a_shared_file_is_evaluated_and_guides(trained, shared, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(shared, tmp_path / "checkpoints")
    config = run_config.load(tmp_path)
    for part in ("enable_bpd", "enable_sampling"):
        config.eval[part] = False
    run_lib.evaluate(config, tmp_path)
    with np.load(tmp_path / "eval/report_0.npz") as file:
        assert file["step"] == 12 and np.isfinite(file["loss"])
    guided = load(shared, {"sampling.guide": str(shared), "sampling.guidance": 2.0})
    assert torch.allclose(guided.sample([1]), load(shared).sample([1]), atol=1e-4)  # its own guide


def test_300_mutated_files_are_refused_or_are_the_same(shared, tmp_path):
    content, chance, path = shared.read_bytes(), random.Random(3), tmp_path / "m.safetensors"
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    run, original, refused = load(shared), load_checkpoint(shared), 0
    values = [
        None,
        "",
        "F32",
        "I8",
        -1,
        0,
        7,
        10**30,
        1.5,
        True,
        [],
        [3],
        [0, 4],
        {},
        [[]],
        "x" * 99,
    ]
    for number in range(300):
        kind = number % 3
        if kind == 0:  # a byte
            changed = bytearray(content)
            place = chance.randrange(len(content) if chance.random() < 0.5 else 8 + length)
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:  # cut short, or longer
            end = chance.choice([chance.randrange(300), chance.randrange(len(content))])
            changed = chance.choice([content[:end], content + content[:end], content[end:]])
        else:  # an entry of the header
            words = json.loads(json.dumps(header))
            owner = chance.choice([words, *words.values()])
            key = chance.choice([*owner])
            if chance.random() < 0.2:
                del owner[key]
            else:
                owner[chance.choice([key, "other"])] = chance.choice(values)
            words = json.dumps(words).encode()
            changed = len(words).to_bytes(8, "little") + words + content[8 + length :]
        path.write_bytes(changed)
        try:
            loaded = load_checkpoint(path)
            run_config.of(path, loaded)
            fit(partial(load_ema, run.experiment.network), loaded, path)
        except ValueError as error:
            assert str(error).isprintable() and str(path) in str(error), number
            refused += 1
        else:  # nothing was changed but what no reader looks at
            assert loaded["config"] == original["config"], number
            assert loaded["step"] == original["step"], number
            assert loaded["model"].keys() == original["model"].keys(), number
            for name, weight in loaded["model"].items():
                assert torch.equal(weight, original["model"][name]), number
    assert refused > 250


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m.update(config="[" * 10**5), "recursion|depth"),
        (lambda m: m.update(config='{"model.nf": 8, "model.xyz": 1}'), "model.xyz"),
        (
            lambda m: m.update(config=m["config"].replace('"model.nf": 8', '"model.nf": 16')),
            "does not fit",
        ),
        (lambda m: m.update(step="9" * 30), "lack the config or the step"),
        (lambda m: m.pop("config"), "lack the config or the step"),
    ],
)
def test_hostile_metadata_are_one_line(shared, tmp_path, change, says, monkeypatch):
    """Metadata changed by an author who knows how to make the checksum."""
    weights = load_checkpoint(shared)["model"]
    write = shared_files.write

    def write_changed(file, tensors, metadata):
        metadata = dict(metadata)
        change(metadata)
        metadata.pop("checksum")
        metadata["checksum"] = shared_files.checksum(tensors, metadata)
        write(file, tensors, metadata)

    monkeypatch.setattr(shared_files, "write", write_changed)
    path = tmp_path / "hostile.safetensors"
    save_shared(path, weights, load_checkpoint(shared)["config"], 12)
    with pytest.raises(ValueError, match=says) as raised:
        load(path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


# --- what is only said, and what is refused -------------------------------------------------------


def test_a_dry_run_of_training_loads_nothing_but_the_weights(trained, monkeypatch):
    contents, plain_fit = [], training_run.fit
    monkeypatch.setattr(
        training_run, "fit", lambda *args: (contents.append(args[1]), plain_fit(*args))[1]
    )
    assert run_lib.train(run_config.load(trained), trained, dry_run=True)
    (moments,) = [content["optimizer"]["state"].values() for content in contents]
    values = [value for entry in moments for value in entry.values()]
    assert values and all(isinstance(value, StoredTensor) for value in values)


def test_a_dry_run_writes_nothing(trained, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = run_config.load(trained)
    before = tree(trained)
    assert run_lib.train(config, trained, dry_run=True)
    run_lib.train(config, tmp_path / "new", dry_run=True)
    run_lib.evaluate(config, trained, dry_run=True)
    config.sampling.update(seeds="0-9", film=True, schedule="fitted")
    run_lib.sample(config, trained, dry_run=True)
    run_lib.export(config, trained, dry_run=True)
    assert tree(trained) == before and not (tmp_path / "new").exists()
    for says in (
        f"would train from step 12 to 12 in {trained}: EDM, 1,617 images",
        f"would train from step 0 to 12 in {tmp_path / 'new'}: EDM",
        "estimated: a step ",
        "checkpoint_12.pth on cpu: enable_loss, enable_bpd, enable_sampling",
        "10 samples, 0 of which are there; a film of 10",
        f"to {trained / 'model.safetensors'}",
    ):
        assert says in caplog.text


def test_mistakes_are_one_line(trained, tmp_path, monkeypatch):
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg there
    at = f"{tmp_path}/"
    for overrides, says in [
        ({"seeds": "a"}, "sampling.seeds must be seeds such as 0-63 or 1,2,5-10, not 'a'"),
        ({"seeds": "5-"}, "sampling.seeds must be seeds"),
        ({"seeds": "-5"}, "sampling.seeds must be seeds"),
        ({"seeds": "5-3"}, "the range 5-3 falls"),
        ({"encode": at + "wide.png"}, "wide.png has 8 x 9 pixels, the network's images 8 x 8"),
        ({"encode": at + "bad.png"}, "bad.png: no PNG, JPEG or WebP file"),
        ({"encode": at + "none.png"}, "sampling.encode=.*none.png does not exist"),
        ({"encode": at + "empty"}, "sampling.encode=.*empty holds no images"),
        ({"between": at + "good.png"}, "must be two images, A.png,B.png"),
        ({"between": f"{at}good.png,{at}wide.png"}, "sampling.between: wide.png has 8 x 9 pixels"),
        ({"film": True, "film_format": "mp4"}, "mp4' needs the program ffmpeg, which is not found"),
        ({"film": True, "film_format": "avi"}, "film_format must be one of .*, not 'avi'"),
    ]:
        with pytest.raises((ValueError, OSError), match=says) as raised:
            sample(trained, tmp_path / "out", **overrides)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotADirectoryError, match=r"--outdir=.*file is a file; name a folder"):
        sample(trained, tmp_path / "file")
    sample(trained, tmp_path / "out", seeds="0-1")
    (tmp_path / "out/000001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000001.png: .*: remove it, and it is drawn again"):
        sample(trained, tmp_path / "out", seeds="0-1")
    with contextlib.suppress(ValueError):
        check_writer("webp")


def test_the_command_line_refuses_in_one_line(trained, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = f"--workdir={trained}"
    done = run_main([workdir, "--mode=sample", f"--outdir={tmp_path}/file"], expect=2)
    assert done.stderr == f"error: --outdir={tmp_path}/file is a file; name a folder\n"
    config = f"--config={ROOT}/configs/poisson/digits_ddpmpp.py"
    done = run_main([workdir, "--mode=train", config, "--outdir=x"], expect=2)
    assert done.stderr == "error: --outdir is for --mode sample and export and data, not train\n"
