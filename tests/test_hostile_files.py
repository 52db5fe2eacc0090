"""A stranger's folder: nothing is written through its links, nothing waits, memory is bounded."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import struct
import zipfile
import zlib

import numpy as np
import pytest
from conftest import peak
from data_files import encoded, pictures
from many_lives import small_config
from PIL import Image
from test_sources import config_of

import run_lib
from experiment import load
from library.sample_folder import read_pictures
from reports.evaluation_page import _film, _readable
from reports.report_file import page_png
from reports.runs import read_run
from sources import folder as image_folder
from sources.base import Unreadable
from sources.files import Files, open_below
from sources.images import decode_image
from sources.stylegan import open_faces
from storage import records, run_config
from storage.files import MAX_JSON
from storage.loggers import Loggers
from storage.shared_files import open_shared
from storage.tensorboard import TensorBoardWriter, read_scalars
from storage.workdir import evaluation_folder, open_workdir, refuse_links

TRAINED = {
    "training.n_iters": 2,
    "training.snapshot_freq": 1,
    "training.snapshot_sampling": True,
    "sampling.ode_solver": "forward_euler",
    "sampling.N": 2,
}


@pytest.fixture(autouse=True)
def no_waiting():
    """Fail a test that hangs."""

    def fail(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert run_lib.train(small_config(**TRAINED), workdir)
    return workdir


@pytest.fixture
def outside(tmp_path):
    """A folder with a file, both as they were after the test."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_bytes(b"precious")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["precious"]
    assert (folder / "precious").read_bytes() == b"precious"


def one_line(error):
    text = str(error.value)
    assert text.isprintable()
    return text


# --- links in a workdir ---------------------------------------------------------------------------


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", [".checkpoints.lock", ".eval.lock"])
def test_a_link_in_place_of_a_lock_is_not_written_to(name, link, tmp_path, outside):
    workdir = tmp_path / "run"
    workdir.mkdir()
    link(outside / "precious", workdir / name)
    folder = workdir / ("eval" if "eval" in name else "checkpoints")
    with pytest.raises(OSError, match=re.escape(name)) as error, open_workdir(workdir, folder):
        pass
    one_line(error)


def test_a_fifo_in_place_of_a_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".checkpoints.lock")
    place = open_workdir(tmp_path, tmp_path / "checkpoints")
    with pytest.raises((OSError, ValueError), match=r"\.checkpoints\.lock") as error, place:
        pass
    one_line(error)


@pytest.mark.parametrize("make", ["symlink", "link", "fifo"])
def test_a_log_that_is_no_file_of_the_run_is_left_alone(make, tmp_path, outside, caplog):
    """The work goes on, and the console hears of it once."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    path = workdir / "stdout.txt"
    os.mkfifo(path) if make == "fifo" else getattr(os, make)(outside / "precious", path)
    with open_workdir(workdir, workdir / "checkpoints"):
        logging.warning("work")
    (line, _) = [record.getMessage() for record in caplog.records]
    assert "stdout.txt" in line and line.endswith(": the log is on the console only")


@pytest.mark.parametrize("dangling", [True, False])
def test_events_go_to_a_file_that_was_not_there(dangling, tmp_path, outside, monkeypatch):
    """Links lie where the writer's first files would be, at any time of the next minute."""
    monkeypatch.setattr("time.time", lambda: 1.8e9)
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    target = outside / ("new" if dangling else "precious")
    for number in (1, 2, 7):
        name = f"events.start{number:06}.out.tfevents.1800000000.host"
        (tmp_path / name).symlink_to(target)
    with contextlib.closing(TensorBoardWriter(tmp_path, 0)) as writer:
        writer.add_scalars({"loss": 1.0}, 1)
    assert (tmp_path / "events.start000008.out.tfevents.1800000000.host").stat().st_size
    assert read_scalars(tmp_path) == {"loss": [(1, 1.0)]}


def test_events_that_cannot_be_written_are_told_of_once(tmp_path, caplog):
    """A name of a file that is there leaves no room for the next number."""
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / f"tensorboard/events.start{'9' * 230}.tfevents.").touch()
    with Loggers("tensorboard", tmp_path, 0, {}) as logs:
        logs.add_scalars({"loss": 1.0}, 1)
    assert len(caplog.records) == 1
    assert "it logs nothing more" in caplog.text


FOLDERS = ["checkpoints", "checkpoints-meta", "samples", "samples/iter_1", "samples/step_2"]
FOLDERS += ["tensorboard", "eval", "eval/ckpt_2"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_leads_out_of_the_workdir_is_refused(name, trained, tmp_path, outside):
    """Before training and evaluation, and before the library, which writes beside checkpoints."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / name, ignore_errors=True)
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).symlink_to(outside)
    if name.startswith("eval"):
        with pytest.raises(ValueError, match=f"{name}|lies outside") as error:
            place = evaluation_folder(workdir, "eval")
            with open_workdir(workdir, place):
                pass
        one_line(error)
        return
    for start in (
        lambda: run_lib.train(small_config(**TRAINED), workdir),
        lambda: run_lib.sample(run_config.load(trained), workdir),
        lambda: load(workdir),
    ):
        with pytest.raises(ValueError, match=f"{workdir / name} is a link to a folder") as error:
            start()
        one_line(error)


def test_files_that_are_links_are_replaced_or_left(trained, tmp_path, outside):
    """Training goes on and draws where each of its files is a link."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for name in ("config.json", "samples/iter_2/sample.png", "checkpoints/checkpoint_3.pth"):
        (workdir / name).unlink(missing_ok=True)
        (workdir / name).symlink_to(outside / "precious")
    for name in (".config.json.partial", ".checkpoint_3.pth.partial"):
        (workdir / "checkpoints" / name).symlink_to(outside / "new")
    (workdir / "checkpoints-meta/.checkpoint.pth.partial").symlink_to(outside / "new")
    assert run_lib.train(small_config(**TRAINED | {"training.n_iters": 3}), workdir)
    assert not (workdir / "checkpoints/checkpoint_3.pth").is_symlink()


def test_the_users_own_links_are_followed(trained, tmp_path):
    """The workdir, a folder above it, links within it, and files that are read."""
    for name in ("above/run", "disk"):
        shutil.copytree(trained, tmp_path / name)
    (tmp_path / "link").symlink_to("above")
    (tmp_path / "run").symlink_to(tmp_path / "above/run")
    (tmp_path / "above/run/samples/latest").symlink_to("iter_2")
    (tmp_path / "above/run/mine").symlink_to("/usr")
    newest = tmp_path / "above/run/checkpoints-meta/checkpoint.pth"
    newest.unlink()
    newest.symlink_to(tmp_path / "disk/checkpoints-meta/checkpoint.pth")
    for workdir in (tmp_path / "run", tmp_path / "link/run"):
        refuse_links(workdir)
        assert run_lib.train(small_config(**TRAINED), workdir)
    assert load(tmp_path / "run").step == 2


# --- what is no file ------------------------------------------------------------------------------


def image(path):
    Files(path.parent, [path.name], lambda name: open_below(path.parent, name))[0]


READERS = {
    "image.png": image,
    "data.zip": lambda path: image_folder.find(config_of("folder", path=str(path)).data),
    "data.npz": lambda path: (
        image_folder.find(config_of("folder", path=str(path)).data).split_names
    ),
    "grid.png": page_png,
    "photos.npy": lambda path: read_pictures("sampling.between", [str(path)], (1, 8, 8)),
    "encoded.png": lambda path: read_pictures("sampling.encode", [str(path)], (1, 8, 8)),
    "r08.tfrecords": records.record_index,
    "faces.tfrecords": lambda path: open_faces(
        config_of("FFHQ", tfrecords_path=str(path)).data, "train"
    ),
    "model.safetensors": open_shared,
    "config.json": lambda path: run_config.find(path.parent),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("make", ["fifo", "zero", "folder"])
def test_what_is_no_file_is_one_line(name, make, tmp_path):
    path = tmp_path / name
    {"fifo": os.mkfifo, "zero": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[make](path)
    with pytest.raises((ValueError, OSError), match=re.escape(name)) as error:
        READERS[name](path)
    one_line(error)


def test_event_files_that_are_none_are_passed_over(tmp_path, caplog):
    with contextlib.closing(TensorBoardWriter(tmp_path, 0)) as writer:
        writer.add_scalars({"loss": 1.0}, 1)
    os.mkfifo(tmp_path / "events.a.tfevents.fifo")
    (tmp_path / "events.b.tfevents.zero").symlink_to("/dev/zero")
    (tmp_path / "events.c.tfevents.none").symlink_to("nowhere")
    (tmp_path / "events.d.tfevents.folder").mkdir()
    (tmp_path / "events.e.tfevents.zeros").touch()
    os.truncate(tmp_path / "events.e.tfevents.zeros", 2**40)  # 2^36 empty records
    assert read_scalars(tmp_path) == {"loss": [(1, 1.0)]}
    assert len(caplog.records) == 5


def test_films_that_are_no_files_are_left_out(tmp_path):
    os.mkfifo(tmp_path / "film.webp")
    (tmp_path / "film.gif").symlink_to("/dev/zero")
    assert _film(tmp_path, tmp_path, 0) == []


# --- memory ---------------------------------------------------------------------------------------


def blank_png(side, colour=2):
    """A PNG of `side` x `side` pixels in one colour, grey (0) or RGB (2), row by row."""
    channels = {0: 1, 2: 3}[colour]
    rows, compressor = [], zlib.compressobj(9)
    for _ in range(side):
        rows.append(compressor.compress(bytes(1 + channels * side)))
    rows = b"".join([*rows, compressor.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("side", "colour"), [(9400, 0), (4200, 2), (13_000, 0)])
def test_an_image_of_more_pixels_than_its_bytes_can_hold_is_named(side, colour, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(blank_png(side, colour))
    with pytest.raises(Unreadable, match=r"bomb\.png: .*pixels") as error:
        image(path)
    one_line(error)
    with pytest.raises(ValueError, match=r"bomb\.png is not shown: .*pixels") as error:
        page_png(path)
    one_line(error)


def test_large_pictures_are_read():
    """Images of one colour are read up to 16 megapixels; noise, whose file is large, beyond."""
    assert decode_image(blank_png(4000, 0), 1).shape == (4000, 4000, 1)
    noise = np.random.default_rng(0).integers(0, 256, (600, 9000), np.uint8)
    large = encoded(np.tile(noise, (8, 1)), "JPEG", quality=30)
    assert decode_image(large, 1).shape == (4800, 9000, 1)


def test_a_page_leaves_out_what_it_cannot_show(tmp_path, caplog):
    (tmp_path / "samples_1.png").write_bytes(blank_png(9400, 0))
    assert _readable(tmp_path / "samples_1.png", page_png) is None
    assert "samples_1.png is not shown: 9,400 x 9,400 pixels" in caplog.text


def test_runs_with_a_picture_that_is_none_are_one_line(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    picture = tmp_path / "run/samples/iter_2/sample.png"
    for content in (blank_png(9400, 0), b"no picture", b""):
        picture.write_bytes(content)
        with pytest.raises(ValueError, match=r"sample\.png is not shown") as error:
            read_run(tmp_path / "run", "run", "eval")
        one_line(error)


def labels_of(n, **more):
    return {"labels": [[f"{i:05d}.png", i % 3] for i in range(n)]} | more


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("filler", ["[],", "{},", '"",'])
def test_a_large_dataset_json_gives_no_labels(kind, filler, tmp_path):
    """Twelve megabytes more than the bound, in a zip of a few kilobytes."""
    words = json.dumps(labels_of(9, more=0)).replace(
        '"more": 0', f'"more": [{filler * (28 * 2**20 // len(filler))}0]'
    )
    files = {f"{i:05d}.png": encoded(pictures(9)[i]) for i in range(9)} | {"dataset.json": words}
    if kind == "zip":
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        path = tmp_path
        for name, content in files.items():
            (path / name).write_bytes(content.encode() if type(content) is str else content)
    data = image_folder.find(config_of("folder", path=str(path)).data)

    def read():
        with pytest.raises(ValueError, match=r"dataset\.json gives no .*larger than 16 MiB") as e:
            data._classes  # noqa: B018
        one_line(e)

    assert peak(read) < 3 * MAX_JSON


def test_as_many_labels_as_images_are_read(tmp_path, monkeypatch):
    """The bound is beyond what a line for each image takes, as ImageNet's million has."""
    for i in range(200):
        (tmp_path / f"{i:05d}.png").write_bytes(encoded(pictures(1)[0]))
    (tmp_path / "dataset.json").write_text(json.dumps(labels_of(200)))
    monkeypatch.setattr(image_folder, "MAX_JSON", 0)
    data = image_folder.find(config_of("folder", path=str(tmp_path)).data)
    assert data._classes.labels.tolist() == [i % 3 for i in range(200)]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_large_json_of_runs_and_shared_files_is_one_line(name, tmp_path):
    path, words = tmp_path / name, b'{"a": [' + b"[]," * (7 * 2**20) + b"0]}"
    path.write_bytes((len(words).to_bytes(8, "little") if "model" in name else b"") + words)
    read = READERS[name]

    def refused():
        with pytest.raises(ValueError, match=re.escape(name) + r".* 16 MiB") as error:
            read(path)
        one_line(error)

    assert peak(refused) < 3 * MAX_JSON


@pytest.mark.parametrize(
    "shape", [(200_000, 1, 8, 8, 1), (48, 3000, 8, 8, 1), (48, 1, 8, 8), (48, 1, 8, 8, 300)]
)
def test_a_cached_film_of_another_shape_is_drawn_again(shape, trained, tmp_path, caplog):
    """The file says that it is what would be drawn; what it holds would fill memory and time."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    config = run_config.load(workdir)
    config.sampling.update(ode_solver="forward_euler", N=3, seeds="5", film=True)
    run_lib.sample(config, workdir)
    path = workdir / "samples/step_2/film.npz"
    with np.load(path) as file:
        arrays = dict(file) | {"frames": np.zeros(shape, np.uint8)}
    np.savez_compressed(path, **arrays)
    run_lib.sample(config, workdir)
    assert "film.npz: frames is uint8" in caplog.text
    with np.load(path) as file:
        assert file["frames"].shape == (48, 1, 8, 8, 1)


@pytest.mark.usefixtures("few_trajectories")
@pytest.mark.parametrize("name", ["relative_errors", "weights", "offsets"])
def test_a_cached_fit_of_another_shape_is_made_again(name, trained, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    fits = {"sampling.ode_solver": "fitted", "sampling.N": 2}
    samples = load(workdir, fits).sample([0])
    (path,) = (path for path in workdir.glob("checkpoints-meta/*.npz") if name in np.load(path))
    arrays = dict(np.load(path))
    for other in (arrays[name][:0], arrays[name][None], arrays[name].astype(str)):
        np.savez_compressed(path, **arrays | {name: other})
        assert (load(workdir, fits).sample([0]) == samples).all()
        assert f"{path.name}: {name} is" in caplog.text
        caplog.clear()


def test_a_film_is_read_again(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    config = run_config.load(workdir)
    config.sampling.update(ode_solver="forward_euler", N=3, seeds="5-6", film=True)
    run_lib.sample(config, workdir)
    path = workdir / "samples/step_2/film.npz"
    before = path.stat().st_mtime_ns
    run_lib.sample(config, workdir)
    assert path.stat().st_mtime_ns == before
    with Image.open(path.with_name("film.webp")) as film:
        assert 10 < film.n_frames <= 48
