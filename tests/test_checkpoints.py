"""Files are complete or absent, and nothing in them is executed."""

import pickle
import re
import sys

import pytest
import torch
from conftest import run_program

from storage.checkpoints import checkpoints_to_evaluate, load_checkpoint, save_checkpoint
from storage.files import atomic_write


def state():
    return {
        "model": {"weight": torch.arange(6.0).view(2, 3)},
        "ema": {"decay": 0.5, "num_updates": 3, "shadow_params": [torch.ones(2)]},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "step": 7,
    }


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "checkpoint.pth"
    save_checkpoint(path, state())
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["weight"], state()["model"]["weight"])
    assert loaded["step"] == 7
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pth"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_an_os_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip", b"\x80"])
def test_what_is_not_a_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pth is not a checkpoint: ."):
        load_checkpoint(path)


def test_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, state())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_checkpoint(path)


def test_missing_parts_are_named(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {}, "step": 1}, path)
    with pytest.raises(ValueError, match="has no ema, optimizer"):
        load_checkpoint(path)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_no_code_is_run(tmp_path, save):
    path = tmp_path / "checkpoint.pth"
    save({**state(), "step": Malicious(tmp_path / "created")}, path)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "created").exists()


class Call:
    """A pickle of it calls `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call", [Call(bytearray, 2**20), Call(set, [1]), Call(torch.device, "cpu")]
)
def test_nothing_that_a_state_does_not_hold_is_made(tmp_path, call):
    """Not what `torch.load(weights_only=True)` calls either, as bytearray(10**12)."""
    path = tmp_path / "checkpoint.pth"
    torch.save({**state(), "more": call}, path)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="is not a checkpoint: its pickle refers to '.*'"):
        load_checkpoint(path)


PROGRAM = """
import resource, sys
from pathlib import Path
from storage.checkpoints import load_checkpoint, written_steps
from storage.checks import check_like

resource.setrlimit(resource.RLIMIT_AS, 2 * (resource.RLIM_INFINITY,))
used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, 2 * (used + 2**29,))
path, entry = Path(sys.argv[1]), sys.argv[2]
try:
    state = load_checkpoint(path)
    check_like(state["ema"]["decay"], 0.5, "ema.decay")
    written_steps(state, path)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("entry", ["step", "decay", "written"])
def test_messages_name_a_value_whose_text_no_memory_holds(tmp_path, entry):
    """A list of lists of lists and so on, in a file of kilobytes; it may use 512 MiB more."""
    nested = [1]
    for _ in range(5):
        nested = [nested] * 1000
    content = {**state(), "written": []}
    (content["ema"] if entry == "decay" else content)[entry] = nested
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    done = run_program([sys.executable, "-c", PROGRAM, str(path), entry])
    assert re.search(rf"{entry}.*\[\[", done.stdout), done.stdout
    assert len(done.stdout) < 500


# --- which to evaluate ----------------------------------------------------------------------------


def write_steps(workdir, *steps, name=lambda step: step):
    for step in steps:
        path = workdir / f"checkpoints/checkpoint_{name(step)}.pth"
        save_checkpoint(path, {**state(), "step": step})


def found(workdir, n_iters, freq, first, end):
    """{k: step in the file's name}."""
    paths = checkpoints_to_evaluate(workdir, first, end, freq, n_iters)
    return {k: int(path.stem.removeprefix("checkpoint_")) for k, path in paths.items()}


@pytest.mark.parametrize("n_iters", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("freq", [1, 2, 4])
def test_every_number_of_steps_has_a_last_checkpoint(n_iters, freq, tmp_path, caplog):
    """What a run of so many steps has written; the numbers asked for are the default ones."""
    caplog.set_level("INFO")
    write_steps(tmp_path, *{*range(freq, n_iters + 1, freq), n_iters})
    last = -(-n_iters // freq)
    k = min(4, last)
    assert found(tmp_path, n_iters, freq, 4, 4) == {k: min(k * freq, n_iters)}
    said = f"the last checkpoint of training.n_iters={n_iters} steps is number {last}"
    assert caplog.text.count(said) == (last < 4)
    every = {k: min(k * freq, n_iters) for k in range(1, last + 1)}
    assert found(tmp_path, n_iters, freq, 1, 99) == every


def test_published_files_are_found_by_their_number(tmp_path, caplog):
    """Also those beyond the configured number of steps, and the last of an uneven number."""
    write_steps(tmp_path, 15, 20, 21, 30, name=lambda step: -(-step // 5))
    assert found(tmp_path, 21, 5, 3, 9) == {3: 3, 4: 4, 5: 5, 6: 6}
    assert found(tmp_path, 21, 5, 6, 6) == {6: 6}
    with pytest.raises(FileNotFoundError, match=r"checkpoint_10\.pth to checkpoint_10\.pth"):
        found(tmp_path, 21, 5, 2, 2)


def test_missing_checkpoints_are_named(tmp_path, caplog):
    write_steps(tmp_path, 4, 8)
    assert found(tmp_path, 8, 2, 2, 4) == {2: 4, 4: 8}
    assert "checkpoint_6.pth does not exist; passed over" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"for checkpoint_9\.pth to checkpoint_9\.pth"):
        found(tmp_path, 9, 2, 7, 8)
