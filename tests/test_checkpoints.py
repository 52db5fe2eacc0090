"""Files are complete or absent, and nothing in them is executed."""

import pickle

import pytest
import torch

from checkpoints import atomic_write, load_checkpoint, save_checkpoint


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
