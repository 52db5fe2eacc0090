"""Kills, full disks, damaged and hostile files: nothing is lost, and the fault is named."""

import contextlib
import io
import json
import logging
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, train_state
from data_files import encoded, pictures, stylegan_example, tfrecord, write_tree
from many_lives import OVERRIDES, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter
from test_checkpoints import resolved
from warm_start import MAIN, Program, run_main

import datasets
import losses
import run_lib
import storage.workdir as workdirs
from library.signals import stop_signals
from storage.checkpoints import load_checkpoint, open_checkpoint, save_checkpoint
from storage.files import atomic_write, save_npz, save_png
from storage.loggers import Loggers
from storage.run_checkpoints import newest_checkpoint
from storage.tensorboard import TensorBoardWriter, read_scalars

FULL_DISK = r"^error: .*No space left on device: '.*checkpoint.*\.pth'\n\Z"


def flags(**overrides):
    """The tiny run of `small_config`, as flags of main.py."""
    config = OVERRIDES | {"training.n_iters": 12} | overrides
    return [f"--config.{key}={str(value).replace(' ', '')}" for key, value in config.items()]


def training(workdir, *options):
    config = ROOT / "configs/poisson/digits_ddpmpp.py"
    return ["--config", str(config), "--mode", "train", "--workdir", str(workdir), *options]


def same(a, b):
    """True if two states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def newest(workdir):
    return load_checkpoint(workdir / "checkpoints-meta/checkpoint.pth")


# --- kills ----------------------------------------------------------------------------------------


def half_written_in_many_lives(mode, workdir, lives, **config):
    """Number of killed processes that left a half-written file; see many_lives.py."""
    options = [f"--config.{key}={json.dumps(value)}" for key, value in config.items()]
    program = str(ROOT / "tests/many_lives.py")
    done = Program([sys.executable, program, mode, workdir, lives, *options]).finish()
    return json.loads(done.stdout)["half written"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lives, changes",
    [
        (14, {}),
        (6, {"training.sde": "pfgmpp", "training.target": "posterior_mean", "model.D": 16.0}),
        (8, {"data.resident_bytes": 0, "data.num_workers": 0, "training.batch_size": 8}),
    ],
    ids=["poisson", "pfgmpp", "disk"],
)
def test_killed_many_times_the_run_ends_as_if_it_never_was(tmp_path, one_thread, lives, changes):
    """SIGKILL at random moments, while checkpoints are written too; the ends are equal bitwise."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    if "data.resident_bytes" in changes:
        write_tree(tmp_path / "data", pictures(40))
        changes = changes | {"data.dataset": "folder", "data.path": str(tmp_path / "data")}
    assert half_written_in_many_lives("train", killed, lives, **changes) > 0
    _, state = newest_checkpoint(killed)  # a kill may have come between the two renames of a save
    reached = state["step"]
    assert reached > 2
    config = small_config(**changes, **{"training.n_iters": reached + 4})
    for workdir in (killed, whole):
        assert run_lib.train(config, workdir)
    last = f"checkpoints/checkpoint_{reached + 4}.pth"
    assert same(load_checkpoint(killed / last), load_checkpoint(whole / last))
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert {path.name for path in (killed / "checkpoints").iterdir()} == names
    assert not list(killed.glob("*/.*.partial"))


@pytest.mark.slow
def test_killed_many_times_an_evaluation_ends_as_if_it_never_was(tmp_path, one_thread):
    evaluation = {
        "training.n_iters": 5,
        "eval.steps": "",
        "eval.begin_ckpt": 1,
        "eval.end_ckpt": 1,
        "eval.batch_size": 45,
        "eval.num_samples": 300,
        "eval.bpd_num_repeats": 2,
        "eval.stats_dir": str(tmp_path / "stats"),
        "sampling.ode_solver": "forward_euler",
        "sampling.N": 10,
        "sampling.rtol": 0.1,
        "sampling.atol": 0.1,
    }
    config = small_config(**evaluation)
    run_lib.train(config, tmp_path)
    half_written_in_many_lives("eval", tmp_path, 6, **evaluation)
    for folder in ("killed", "whole"):
        run_lib.evaluate(config, tmp_path, folder)
    killed, whole = (
        {name: value for name, value in np.load(path).items() if not name.endswith("seconds")}
        for path in (tmp_path / "killed/report_1.npz", tmp_path / "whole/report_1.npz")
    )
    assert {"loss", "bpd", "fid", "kid", "precision", "recall"} <= killed.keys()
    np.testing.assert_equal(killed, whole)
    names = [
        {path.relative_to(tmp_path / folder) for path in (tmp_path / folder).glob("**/*")}
        for folder in ("killed", "whole")
    ]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("resident_bytes", [2**31, 0], ids=["memory", "disk"])
def test_a_signal_ends_the_run_after_its_step_and_the_printed_command_goes_on(
    tmp_path, one_thread, resident_bytes
):
    """The signal reaches the whole process group, including the workers that decode images."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    changes = {"data.resident_bytes": resident_bytes, "data.num_workers": 1}
    changes |= {"training.n_iters": 60, "training.snapshot_freq": 60}
    command = [*MAIN, *training(stopped, *flags(**changes))]
    reached, saved = 0, None
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        process = Program(command, start_new_session=True)
        newest_state = stopped / "checkpoints-meta/checkpoint.pth"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(FileNotFoundError):  # between the two renames of a save
                if newest_state.stat().st_mtime_ns != saved:
                    break
            time.sleep(0.01)
        os.killpg(process.pid, getattr(signal, name))
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75
        before, reached = reached, newest(stopped)["step"]
        saved = newest_state.stat().st_mtime_ns
        assert before < reached < 60
        assert f"stopped by {name} at step {reached}, which is saved" in output
        assert output.splitlines()[-1] == f"to go on: {shlex.join(command)}"
        command = shlex.split(output.splitlines()[-1].removeprefix("to go on: "))
    Program(command).finish()
    run_lib.train(small_config(**changes), whole)
    last = "checkpoints/checkpoint_60.pth"
    assert same(load_checkpoint(stopped / last), load_checkpoint(whole / last))


def test_a_second_signal_ends_the_process_at_once():
    program = "import time\nfrom library.signals import stop_signals\n"
    program += "with stop_signals() as stop:\n"
    program += " print('ready', flush=True)\n while True:\n"
    program += "  time.sleep(0.01)\n  if stop(): print(stop(), flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    process.stdout.close()


def test_signals_mean_afterwards_what_they_meant_before():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signals() as stop:
        assert stop() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_picture_that_a_stop_left_out_is_drawn_by_the_next_start(tmp_path, monkeypatch):
    config = small_config(
        **{"training.n_iters": 4, "training.snapshot_freq": 2, "training.snapshot_sampling": True},
        **{"training.picture_freq": 1},
    )
    config.sampling.ode_solver, config.sampling.N = "forward_euler", 2
    step = run_lib.train_step

    def step_then_signal(state, *arguments):
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *arguments)

    monkeypatch.setattr(run_lib, "train_step", step_then_signal)
    assert not run_lib.train(config, tmp_path)
    assert not (tmp_path / "samples").exists()
    monkeypatch.setattr(run_lib, "train_step", step)
    assert run_lib.train(config, tmp_path)
    folders = {path.parent.name for path in tmp_path.glob("samples/*/sample.png")}
    assert folders == {"iter_2", "iter_4"}


# --- damaged and foreign checkpoints --------------------------------------------------------------


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_state_is_named_and_the_one_before_taken(tmp_path, one_thread, caplog):
    caplog.set_level(logging.INFO)
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    run_lib.train(small_config(**{"training.n_iters": 9}), whole)
    run_lib.train(small_config(**{"training.n_iters": 7}), damaged)
    meta = damaged / "checkpoints-meta"
    damage(meta / "checkpoint.pth")
    run_lib.train(small_config(**{"training.n_iters": 9}), damaged)
    log = (damaged / "stdout.txt").read_text()
    assert re.search(r"checkpoint\.pth is not a checkpoint: it is damaged: .*record .*differs", log)
    assert "resuming at step 6 of 9" in log
    assert same(newest(damaged), newest(whole))
    names = {"checkpoint.pth", "checkpoint.prev.pth", "checkpoint.pth.damaged"}
    assert {path.name for path in meta.iterdir()} == names
    assert load_checkpoint(meta / "checkpoint.prev.pth")["step"] == 6


def test_numbered_checkpoints_are_the_last_resort(tmp_path):
    run_lib.train(small_config(**{"training.n_iters": 7}), tmp_path)
    for path in (tmp_path / "checkpoints-meta").iterdir():
        damage(path)
    damage(tmp_path / "checkpoints/checkpoint_7.pth")
    path, state = newest_checkpoint(tmp_path)
    assert (path.name, state["step"]) == ("checkpoint_5.pth", 5)
    damage(path)
    with pytest.raises(ValueError, match=r"no intact checkpoint .*checkpoint_5.pth damaged"):
        newest_checkpoint(tmp_path)


def test_as_many_numbered_checkpoints_are_kept_as_asked(tmp_path):
    """Old ones go after a resume too; files that the run did not write stay."""
    config = small_config(**{"training.keep_checkpoints": 2, "training.snapshot_freq": 2})
    folder = tmp_path / "checkpoints"
    for n_iters in (5, 11):
        config.training.n_iters = n_iters
        run_lib.train(config, tmp_path)
        for step in (1, 100):
            (folder / f"checkpoint_{step}.pth").write_text("a stranger's")
    steps = {path.name for path in folder.iterdir()}
    assert steps == {f"checkpoint_{step}.pth" for step in (1, 10, 11, 100)}


def test_steps_in_a_hostile_checkpoint_name_no_other_file(tmp_path):
    config = small_config(**{"training.n_iters": 2, "training.keep_checkpoints": 1})
    run_lib.train(config, tmp_path)
    path = tmp_path / "checkpoints-meta/checkpoint.pth"
    save_checkpoint(path, newest(tmp_path) | {"written": ["1/../../../precious"]})
    with pytest.raises(ValueError, match="precious"):
        run_lib.train(config, tmp_path)


def tiny_checkpoint(path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    state = train_state(small_config(), model)
    model(torch.ones(4, 8)).sum().backward()
    state.apply_gradient(torch.tensor(True))
    save_checkpoint(path, state.state_dict())
    return path.read_bytes()


def mutated(content, chance):
    """`content` with some bits flipped, cut short, extended, or with a block of zeros."""
    content = bytearray(content)
    kind = chance.choice(("flip", "flip", "headers", "cut", "extend", "zeros"))
    if kind == "flip":
        for _ in range(chance.choice((1, 1, 8, 64))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "headers":  # most bytes are those of tensors; the first and last are not
        near = chance.randrange(min(2000, len(content)))
        content[chance.choice((near, -near - 1))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "extend":
        content += chance.randbytes(chance.choice((1, 100, 70000)))
    else:
        start = chance.randrange(len(content))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    return bytes(content)


@pytest.mark.slow
def test_500_mutated_checkpoints_load_as_they_were_or_are_refused(tmp_path):
    content = tiny_checkpoint(tmp_path / "good.pth")
    original = load_checkpoint(tmp_path / "good.pth")
    path, chance, refused = tmp_path / "mutated.pth", random.Random(1), 0
    for _ in range(500):
        path.write_bytes(mutated(content, chance))
        start = time.monotonic()
        damaged = []
        for read in (load_checkpoint, partial(open_checkpoint, intact=True)):
            try:
                assert same(resolved(read(path)), original)
            except ValueError as error:
                assert re.fullmatch(rf"{path} is not a (training )?checkpoint: .+", str(error))
                damaged.append(read)
        assert len(damaged) in (0, 2)  # both readers refuse, or none
        refused += bool(damaged)
        assert time.monotonic() - start < 10
    assert 250 < refused < 500  # bytes after the end may be harmless


def rewritten(path, change, **options):
    """The archive at `path` again, its records changed by `change(name, content)`."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", **options) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return packed.getvalue()


def test_a_tensor_marked_as_a_folder_is_read(tmp_path):
    """An attribute, which one flipped bit sets, or a name can mark a tensor as a folder.

    torch.load then reads nothing, and gives whatever the memory held before.
    """
    path = tmp_path / "folder.pth"
    good = tiny_checkpoint(path)
    content, original = bytearray(good), load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        entry = content.index(b"archive/data/0", archive.start_dir) - 46
    content[entry + 38] ^= 0x10  # external attributes
    path.write_bytes(content)
    assert same(load_checkpoint(path), original)

    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(packed, "w") as new:
        for record in old.infolist():
            name, content = record.filename, old.read(record)
            if name == "archive/data.pkl":
                content = content.replace(b"X\1\0\0\0" + b"0", b"X\2\0\0\0" + b"0/")
            new.writestr(f"{name}/" if name == "archive/data/0" else name, content)
    path.write_bytes(packed.getvalue())
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0/").is_dir()
    assert same(load_checkpoint(path), original)


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"model": torch.zeros(10**7)}, path)
    path.write_bytes(rewritten(path, lambda n, c: c, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"bomb\.pth .*records are larger than the file"):
        load_checkpoint(path)


def test_a_checkpoint_whose_tensors_claim_more_than_they_hold_is_refused(tmp_path):
    """Its checksums are right; a stranger can compute them."""
    path = tmp_path / "liar.pth"
    torch.save({"model": torch.zeros(1000)}, path)

    def claim(name, content):
        return content.replace(b"M\xe8\x03", b"J\x00\x00\x00\x7f")  # 1000, 2130706432

    path.write_bytes(rewritten(path, claim))
    with pytest.raises(ValueError, match=r"liar\.pth is not a checkpoint: .*size"):
        load_checkpoint(path)


def test_an_expanded_tensor_that_claims_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "expanded.pth"
    torch.save({"model": torch.zeros(1).expand(2**38)}, path)
    with pytest.raises(ValueError, match=r"expanded\.pth is not a checkpoint: .*beyond its memory"):
        load_checkpoint(path)


def test_moments_of_another_shape_do_not_fit(tmp_path):
    config = small_config(**{"training.n_iters": 2})
    run_lib.train(config, tmp_path)
    path = tmp_path / "checkpoints-meta/checkpoint.pth"
    state = newest(tmp_path)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match=r"\.pth does not fit .*state\.0\.exp_avg has"):
        run_lib.train(config, tmp_path)


# --- damaged and hostile data ---------------------------------------------------------------------


def load_or_refuse(name, **data):
    """Images (n, 1, 8, 8) of a data set, None where it is refused in one line; in 10 seconds."""
    config = small_config()
    with config.unlocked():
        config.data.update(dataset=name, num_workers=0, **data)
    start = time.monotonic()
    try:
        dataset = datasets.get_dataset(config, "train")
        images = dataset[torch.arange(len(dataset))]
    except (ValueError, OSError) as error:
        assert re.fullmatch(".+", str(error))
        return None
    finally:
        assert time.monotonic() - start < 10
    assert (images.dtype, images.shape[1:]) == (torch.uint8, (1, 8, 8))
    return images


def assert_among(images, originals):
    """Nothing was read that nobody wrote; `originals` are (n, H, W, 1)."""
    contents = {original.tobytes() for original in originals}
    assert all(image.numpy().tobytes() in contents for image in images)


@pytest.mark.slow
@pytest.mark.parametrize("resident_bytes", [0, 2**31], ids=["disk", "memory"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_600_mutated_images_are_read_or_named(tmp_path, kind, resident_bytes, caplog):
    """A hundred at a time. A PNG holds checksums, so its pixels are right; the others do not."""
    original, chance = pictures(1, channels=1)[0], random.Random(0)
    content = encoded(original[..., 0], kind)
    good = {f"good{i}.{kind.lower()}": content for i in range(10)}
    bad = {f"bad{i}.{kind.lower()}": mutated(content, chance) for i in range(100)}
    for name, image_file in (good | bad).items():
        (tmp_path / name).write_bytes(image_file)
    images = load_or_refuse("folder", path=str(tmp_path), resident_bytes=resident_bytes)
    named = set(re.findall(r"(?:good|bad)\d+\.\w+", caplog.text))
    assert named
    assert named <= bad.keys()
    if kind == "PNG":
        assert_among(images, [original])


@pytest.mark.slow
def test_300_mutated_zips_are_read_or_refused(tmp_path):
    path, chance, refused = tmp_path / "pictures.zip", random.Random(3), 0
    originals = pictures(10, channels=1)
    with zipfile.ZipFile(path, "w") as archive:
        for i, original in enumerate(originals):
            archive.writestr(f"{i}.png", encoded(original[..., 0]))
    content = path.read_bytes()
    for _ in range(300):
        path.write_bytes(mutated(content, chance))
        images = load_or_refuse("folder", path=str(path))
        if images is None:
            refused += 1
        else:
            assert_among(images, originals)
    assert 30 < refused < 300


@pytest.mark.slow
def test_200_mutated_tfrecords_are_read_or_refused(tmp_path):
    path, chance, refused = tmp_path / "faces-r03.tfrecords", random.Random(4), 0
    originals = pictures(12, channels=1)
    content = tfrecord(*(stylegan_example(original) for original in originals))
    for _ in range(200):
        path.write_bytes(mutated(content, chance))
        images = load_or_refuse("ffhq", tfrecords_path=str(path))
        if images is None:
            refused += 1
        else:
            assert_among(images, originals)
    assert 20 < refused < 200


def test_entries_of_a_zip_cannot_leave_it(tmp_path):
    path = tmp_path / "data" / "pictures.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../outside.png", f"{tmp_path}/absolute.png", *(f"{i}.png" for i in range(9))):
            archive.writestr(name, encoded(pictures(1, channels=1)[0, ..., 0]))
    load_or_refuse("folder", path=str(path))
    assert list(tmp_path.iterdir()) == [path.parent]
    assert list(path.parent.iterdir()) == [path]


def test_an_image_that_claims_gigabytes_is_named(tmp_path, caplog):
    """A PNG of 40,000 x 40,000 pixels in a hundred bytes, its checksums right."""
    content = encoded(pictures(1, channels=1)[0, ..., 0])
    for i in range(20):
        (tmp_path / f"good{i}.png").write_bytes(content)
    header = content[12:16] + 2 * (40_000).to_bytes(4, "big") + content[24:29]
    checksum = zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(content[:12] + header + checksum + content[33:])
    images = load_or_refuse("folder", path=str(tmp_path))
    assert "huge.png" in caplog.text
    assert len(images) > 10


# --- another config -------------------------------------------------------------------------------


def test_what_a_resumed_run_changes_is_said(tmp_path):
    run_lib.train(small_config(**{"training.n_iters": 2}), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["training.n_iters"] == 2
    assert stored["model.ch_mult"] == [1]
    run_lib.train(small_config(**{"training.n_iters": 2}), tmp_path)
    assert "config differs" not in (tmp_path / "stdout.txt").read_text()
    run_lib.train(small_config(**{"training.n_iters": 4, "optim.lr": 0.5}), tmp_path)
    log = (tmp_path / "stdout.txt").read_text()
    for change in ("training.n_iters: 2 -> 4", "optim.lr: 0.001 -> 0.5"):
        assert f"the config differs from that of the run: {change}\n" in log
    assert json.loads((tmp_path / "config.json").read_text()) == stored


def test_weights_that_do_not_fit_are_refused_with_the_keys_that_changed(tmp_path):
    run_lib.train(small_config(**{"training.n_iters": 2}), tmp_path)
    config = small_config(**{"training.n_iters": 4, "model.nf": 16})
    with pytest.raises(ValueError, match=r"does not fit .*model\.nf: 8 -> 16, training\.n_iters"):
        run_lib.train(config, tmp_path)
    assert newest(tmp_path)["step"] == 2


def test_a_damaged_config_json_costs_nothing_since_checkpoints_carry_the_config(tmp_path):
    run_lib.train(small_config(**{"training.n_iters": 2}), tmp_path)
    (tmp_path / "config.json").write_text("[" * 10**5)
    run_lib.train(small_config(**{"training.n_iters": 3}), tmp_path)
    log = (tmp_path / "stdout.txt").read_text()
    assert "the config differs from that of the run: training.n_iters: 2 -> 3\n" in log


# --- losses and gradients that are not finite -----------------------------------------------------


def spoil(monkeypatch, batches):
    """Makes the loss of these batches infinite."""
    calls = []

    class Spoilt(losses.Regression):
        def loss(self, net, examples, reference):
            loss = super().loss(net, examples, reference)
            if not loss.requires_grad:
                return loss
            calls.append(examples)
            return loss * torch.inf if len(calls) - 1 in batches else loss

    monkeypatch.setitem(losses.OBJECTIVES, "regression", Spoilt)


def test_bad_batches_are_named_and_passed_over(tmp_path, monkeypatch, one_thread):
    config = small_config(**{"training.n_iters": 9, "training.max_bad_steps": 3})
    spoil(monkeypatch, {2, 3, 5, 6})
    assert run_lib.train(config, tmp_path)
    log = (tmp_path / "stdout.txt").read_text()
    named = re.findall(r"batch (\d+): the loss or its gradient is not finite", log)
    assert named == ["2", "3", "5", "6"]
    state = newest(tmp_path)
    assert state["step"] == 9
    assert state["optimizer"]["state"][0]["step"] == 5


def test_too_many_bad_batches_in_a_row_end_the_run(tmp_path, monkeypatch, one_thread):
    config = small_config(**{"training.n_iters": 30, "training.max_bad_steps": 4})
    spoil(monkeypatch, {2, *range(8, 30)})
    with pytest.raises(FloatingPointError, match=r"max_bad_steps=4 .* the last one number 11;"):
        run_lib.train(config, tmp_path)
    state = newest(tmp_path)
    assert state["step"] <= 12
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert "stopped by FloatingPointError" in (tmp_path / "stdout.txt").read_text()


# --- two processes, one workdir -------------------------------------------------------------------


def test_the_second_process_is_refused_and_a_dead_one_makes_way(tmp_path):
    program = "import sys; from pathlib import Path; from storage.workdir import open_workdir\n"
    program += "with open_workdir(Path(sys.argv[1]), Path(sys.argv[1], 'checkpoints')):\n"
    program += " print('open', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "open\n"
    done = run_main(training(tmp_path, *flags()), expect=2)
    named = rf"process {holder.pid} on {re.escape(socket.gethostname())};"
    assert re.fullmatch(rf"error: .*checkpoints is being written by {named}.*\n", done.stderr)
    with workdirs.open_workdir(tmp_path, tmp_path / "eval"):
        pass  # what an evaluation does meanwhile
    holder.kill()
    holder.communicate()
    with workdirs.open_workdir(tmp_path, tmp_path / "checkpoints"):
        assert f"process {os.getpid()} " in (tmp_path / ".checkpoints.lock").read_text()


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted; RLIMIT_FSIZE stands in below")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def assert_intact(workdir):
    """No part of a file is left, and all checkpoints load."""
    assert not list(workdir.glob("**/.*.partial"))
    for path in workdir.glob("checkpoints*/*.pth"):
        load_checkpoint(path)


@pytest.mark.slow
def test_a_full_disk_costs_nothing_earlier(tmp_path, small_disk):
    workdir, whole = small_disk / "run", tmp_path / "whole"
    done = run_main(training(workdir, *flags(**{"training.n_iters": 60})), expect=2)
    assert re.search(FULL_DISK, done.stderr, re.M)
    assert_intact(workdir)
    assert newest(workdir)["step"] > 0
    for path in (workdir / "checkpoints").iterdir():
        path.unlink()  # makes room
    options = flags(**{"training.n_iters": 20, "training.snapshot_freq": 20})
    run_main(training(workdir, *options))
    run_main(training(whole, *options))
    last = "checkpoints/checkpoint_20.pth"
    assert same(load_checkpoint(workdir / last)["model"], load_checkpoint(whole / last)["model"])


def test_a_disk_that_is_full_from_the_start_is_named(small_disk):
    (small_disk / "ballast").write_bytes(bytes(1500 * 1024 - 4096))
    with contextlib.suppress(OSError), open(small_disk / "ballast", "ab") as file:
        file.write(bytes(8192))
    done = run_main(training(small_disk / "run", *flags()), expect=2)
    assert re.search(rf"^error: .*No space left on device.*{small_disk}", done.stderr, re.M)


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_costs_nothing_earlier(tmp_path):
    run_main(training(tmp_path, *flags(**{"training.n_iters": 4})))

    start = [*MAIN, *training(tmp_path, *flags())]
    done = Program([sys.executable, "-c", LIMITED, *start[1:]]).finish(expect=2)
    assert re.search(r"^error: .*File too large: '.*checkpoint.*\.pth'\n\Z", done.stderr, re.M)
    assert_intact(tmp_path)
    assert newest(tmp_path)["step"] == 4


def noise_image():
    return np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_checkpoint(path, {"weight": torch.rand(10**6)}),
        lambda path: save_npz(path, samples=np.random.default_rng(0).random(10**6)),
        lambda path: save_png(path, noise_image()),
    ],
    ids=["checkpoint", "npz", "png"],
)
def test_every_kind_of_file_names_itself_on_a_full_disk(small_disk, save):
    path = small_disk / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
        save(path)
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]


def test_a_lost_permission_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chmod(tmp_path, 0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may do anything
    try:
        with pytest.raises(PermissionError, match=str(tmp_path)), atomic_write(path) as file:
            file.write(b"new")
    finally:
        os.seteuid(user)
        os.chmod(tmp_path, 0o700)
    assert path.read_bytes() == b"old"


def test_a_file_removed_while_it_is_written_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError, match=r"file.*file"), atomic_write(path) as file:
        file.write(b"new")
        (tmp_path / ".file.partial").unlink()
    assert path.read_bytes() == b"old"


def test_what_is_written_is_read_back_before_the_old_is_dropped(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"step": 1})

    def save_wrongly(state, file):
        torch_save(state, file)
        file.seek(-300, os.SEEK_CUR)
        file.write(b"\xff")

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", save_wrongly)
    with pytest.raises(OSError, match=r"reads back otherwise: .*checkpoint\.pth"):
        save_checkpoint(path, {"step": 2}, tmp_path / "previous.pth")
    assert torch.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_that_cannot_be_written_is_told_of_once(caplog, monkeypatch):
    logger = logging.getLogger("a full disk")
    monkeypatch.setattr(workdirs, "open_regular", lambda path, mode, follow: path.open(mode))
    with workdirs._log_file("/dev/full"):
        logger.warning("first")
        logger.warning("second")
    lines = [record.getMessage() for record in caplog.records if record.name == "storage.workdir"]
    assert len(lines) == 1
    assert re.fullmatch(r"/dev/full: .*No space left.*", lines[0])


def test_tensorboard_that_cannot_be_written_is_told_of_once(tmp_path, caplog, monkeypatch):
    def full(event):
        raise OSError(28, "No space left on device")

    with Loggers("tensorboard", tmp_path, 0, {}) as logs:
        monkeypatch.setattr(logs.loggers["tensorboard"].events, "write_event", full)
        logs.add_scalars({"loss": 1.0}, 1)
        logs.add_scalars({"loss": 1.0}, 2)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"the logger .*No space left on device: .*/tensorboard'; it logs nothing more", message
    )


def test_a_clock_that_is_set_back_loses_no_part_of_the_curve(tmp_path, monkeypatch):
    """Names of event files begin with a time; those of older programs do so only."""
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 1)
        writer.add_scalar("loss", 2.0, 2)
    real = time.time
    for start, (step, hours) in enumerate([(1, 0), (2, -9), (3, -5)]):
        monkeypatch.setattr(time, "time", lambda back=3600 * hours: real() + back)
        with contextlib.closing(TensorBoardWriter(tmp_path, step)) as writer:
            writer.add_scalars({"loss": 10.0 + start}, step + 1)
    assert read_scalars(tmp_path) == {"loss": [(1, 1.0), (2, 10.0), (3, 11.0), (4, 12.0)]}
    monkeypatch.undo()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in board.Scalars("loss")] == [1.0, 10.0, 11.0, 12.0]


@pytest.mark.slow
def test_an_evaluation_on_a_full_disk_is_one_line(tmp_path, small_disk):
    workdir, config = small_disk / "run", [f"--config.eval.stats_dir={tmp_path / 'stats'}"]
    run_main(training(workdir, *flags(**{"training.n_iters": 2}), *config))
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(small_disk / "ballast", (small_disk / "ballast").stat().st_size - 40_000)
    evaluation = ["eval" if word == "train" else word for word in training(workdir)]
    options = {"eval.enable_bpd": False, "eval.num_samples": 1000, "sampling.N": 2}
    options |= {"training.n_iters": 2, "sampling.ode_solver": "forward_euler"}
    done = run_main([*evaluation, *flags(**options), *config], expect=2)
    lines = re.split("[\r\n]", done.stderr)
    (error,) = (line for line in lines if line.strip() and "image/s" not in line)
    assert re.fullmatch(rf"error: .*No space left on device: '{small_disk}.*'", error)
