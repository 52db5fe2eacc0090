"""Files are complete or absent, and nothing in them is executed."""

import os
import pickle
import re
import sys
import weakref

import pytest
import safetensors.torch
import torch
from conftest import run_program, train_state
from warm_start import Program

from configs.pfgmpp import digits_ddpmpp
from configs.ve import digits_ncsnpp
from models import create_model, reference_names
from models.weights import load_ema
from storage import run_config
from storage.checkpoints import load_checkpoint, open_checkpoint, save_checkpoint
from storage.files import atomic_write, read_arrays
from storage.run_checkpoints import (
    checkpoints_of_steps,
    checkpoints_to_evaluate,
    find_checkpoint,
)
from storage.shared_files import save_shared
from storage.stored_tensors import StoredTensor, StoredView
from storage.workdir import check_settings, open_workdir


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
    """Calls that `torch.load(weights_only=True)` allows are refused too: bytearray(10**12)."""
    path = tmp_path / "checkpoint.pth"
    torch.save({**state(), "more": call}, path)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="is not a checkpoint: its pickle refers to '.*'"):
        load_checkpoint(path)


PROGRAM = """
import resource, sys
from pathlib import Path
from storage.checkpoints import load_checkpoint
from storage.run_checkpoints import written_steps
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
    done = Program([sys.executable, "-c", PROGRAM, path, entry]).finish()
    assert re.search(rf"{entry}.*\[\[", done.stdout), done.stdout
    assert len(done.stdout) < 500


# --- tensors that are read when they are asked for ------------------------------------------------


def resolved(entry):
    """The content of a checkpoint, its tensors read one by one."""
    if isinstance(entry, dict):
        return {key: resolved(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [*map(resolved, entry)]
    return entry.load() if isinstance(entry, StoredTensor) else entry


def test_stored_tensors_are_those_that_were_saved(tmp_path):
    """Parts of a larger memory, any order of axes, any number type, and empty tensors return."""
    memory = torch.arange(24.0)
    tensors = {
        "whole": memory,
        "part": memory[5:11].view(2, 3),
        "turned": memory[4:16].view(3, 4).T,
        "every other": memory[1::2],
        "laid out": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.rand(7).half(),
        "bfloat16": torch.rand(2, 2).bfloat16(),
        "whole numbers": torch.arange(5),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
    }
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, state() | {"model": tensors})
    stored = open_checkpoint(path)["model"]
    for name, tensor in tensors.items():
        assert isinstance(stored[name], StoredTensor)
        assert (stored[name].shape, stored[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(stored[name].load(), tensor)
    assert stored["laid out"].load().stride() == tensors["laid out"].stride()
    assert stored["part"].load().untyped_storage().nbytes() == 6 * 4
    shared = load_checkpoint(path)["model"]  # memory shared as it was saved
    memories = {shared[name].untyped_storage().data_ptr() for name in ("whole", "part", "turned")}
    assert len(memories) == 1


def damage(path, content):
    """Flips a bit of `content`, bytes that the file has once."""
    whole = bytearray(path.read_bytes())
    assert whole.count(content) == 1
    whole[whole.index(content)] ^= 1
    path.write_bytes(whole)


def test_damage_shows_where_it_is_read(tmp_path):
    path, meta = tmp_path / "checkpoint.pth", tmp_path / "checkpoints-meta"
    content = state() | {"config": {"seed": 7}}
    for place in (path, meta / "checkpoint.pth", meta / "checkpoint.prev.pth"):
        save_checkpoint(place, content | {"step": 6 if "prev" in place.name else 7})
    numbers = torch.arange(6.0).numpy().tobytes()
    for place in (path, meta / "checkpoint.pth"):
        damage(place, numbers)
    opened = open_checkpoint(path)
    assert torch.equal(opened["ema"]["shadow_params"][0].load(), torch.ones(2))
    for _ in range(2):
        with pytest.raises(ValueError, match="it is damaged: its record .* differs"):
            opened["model"]["weight"].load()
    for refuse in (load_checkpoint, lambda p: open_checkpoint(p, intact=True), find_checkpoint):
        with pytest.raises(ValueError, match=r"checkpoint\.pth is not a checkpoint: it is damaged"):
            refuse(path)
    # the newest intact one is taken, and a config is read without any tensor
    assert find_checkpoint(tmp_path)[0].name == "checkpoint.prev.pth"
    assert run_config.find(tmp_path)[0].name == "checkpoint.pth"
    assert run_config.find(tmp_path)[1].seed == run_config.of(path, opened).seed == 7


def test_an_open_checkpoint_is_the_file_that_it_was(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, state())
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    opened = open_checkpoint(path)
    save_checkpoint(path, state() | {"model": {"weight": torch.zeros(9, 9)}})
    assert torch.equal(opened["model"]["weight"].load(), state()["model"]["weight"])
    path.unlink()
    assert resolved(opened)["step"] == 7
    del opened  # closes it
    assert before is None or len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("names", ["own", "published"])
def test_a_network_takes_its_ema_weights_one_by_one_and_nothing_else(tmp_path, monkeypatch, names):
    """Beside the EMA only weights without training are read: Fourier features' frequencies."""
    config = digits_ncsnpp.get_config()
    config.model.nf = 8
    saved = train_state(config)
    for number, average in enumerate(saved.ema.shadow_params):
        average.fill_(number)
    content = saved.state_dict()
    frozen = {n: p for n, p in saved.model.named_parameters() if not p.requires_grad}
    assert frozen
    if names == "published":
        published = reference_names(saved.model)
        content["model"] = {f"module.{n}": content["model"][key] for n, key in published.items()}
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, content)
    loads, alive = [], []

    def load(stored):
        assert not any(reference() is not None for reference in alive)
        tensor = read(stored)
        loads.append(stored)
        alive[:] = [weakref.ref(tensor)]
        return tensor

    read = StoredView.load
    monkeypatch.setattr(StoredView, "load", load)
    model = create_model(config)
    assert load_ema(model, open_checkpoint(path, intact=True)) == 0
    assert len(loads) == len(frozen) + len(saved.parameters)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all((p == number).all() for number, p in enumerate(trained))
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())


class WithBuffer(torch.nn.Module):
    """A network with a buffer, and with one weight under two names."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.tied = torch.nn.Linear(1, 1)
        self.again = self.tied
        self.register_buffer("mean", torch.zeros(2))


def test_buffers_and_tied_weights_are_loaded(tmp_path):
    saved = train_state(digits_ddpmpp.get_config(), WithBuffer())
    saved.model.mean.fill_(3.0)
    for average in saved.ema.shadow_params:
        average.fill_(5.0)
    save_checkpoint(tmp_path / "checkpoint.pth", saved.state_dict())
    for read in (open_checkpoint, load_checkpoint):
        model = WithBuffer()
        load_ema(model, read(tmp_path / "checkpoint.pth"))
        assert model.mean.tolist() == [3.0, 3.0]
        assert all((p == 5).all() for p in model.parameters())


def test_a_shared_file_is_opened_without_its_tensors(tmp_path):
    config = digits_ddpmpp.get_config()
    config.model.nf = 8
    model, path = create_model(config), tmp_path / "model.safetensors"
    save_shared(path, model.state_dict(), run_config.flatten(config), 3)
    stored = open_checkpoint(path, intact=True)
    assert all(isinstance(weight, StoredTensor) for weight in stored["model"].values())
    other = create_model(config)
    assert load_ema(other, stored) == 3
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run_config.of(path, open_checkpoint(path)).model.nf == 8
    with pytest.raises(ValueError, match="its content differs from its checksum"):
        load_checkpoint(path)


# --- which to evaluate ----------------------------------------------------------------------------


def write_steps(workdir, *steps, name=lambda step: step):
    for step in steps:
        path = workdir / f"checkpoints/checkpoint_{name(step)}.pth"
        save_checkpoint(path, {**state(), "step": step})


def checkpoint_steps(workdir, n_iters, freq, first, end):
    """{k: step in the file's name}."""
    paths = checkpoints_to_evaluate(workdir, first, end, freq, n_iters)
    return {k: int(path.stem.removeprefix("checkpoint_")) for k, path in paths.items()}


@pytest.mark.parametrize(
    "steps, freq, numbers",
    [("last", 4, [3]), ("12", 4, [3]), ("10,3", 4, [3, 1]), ("3,10", 1, [3, 10]), ("10", 9, [2])],
)
def test_checkpoints_by_their_steps(steps, freq, numbers, tmp_path):
    """A number in the names of reports is the step in units of the frequency, rounded up."""
    write_steps(tmp_path, 3, 10, 12)
    paths = checkpoints_of_steps(tmp_path, steps, freq)
    assert [*paths] == numbers
    names = ["12"] if steps == "last" else steps.split(",")
    assert [path.name for path in paths.values()] == [f"checkpoint_{each}.pth" for each in names]


def test_steps_that_cannot_be_evaluated_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="^no checkpoint to evaluate: .* has none"):
        checkpoints_of_steps(tmp_path, "last", 4)
    write_steps(tmp_path, 3, 10, 12)
    with pytest.raises(FileNotFoundError, match="has no step 4, but 3, 10, 12$"):
        checkpoints_of_steps(tmp_path, "3,4", 4)
    with pytest.raises(ValueError, match="_10.pth and checkpoint_12.pth are both number 1"):
        checkpoints_of_steps(tmp_path, "10,12", 12)


@pytest.mark.parametrize("n_iters", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("freq", [1, 2, 4])
def test_every_number_of_steps_has_a_last_checkpoint(n_iters, freq, tmp_path, caplog):
    """Evaluation by the default numbers takes the last checkpoint of a run of any length."""
    caplog.set_level("INFO")
    write_steps(tmp_path, *{*range(freq, n_iters + 1, freq), n_iters})
    last = -(-n_iters // freq)
    k = min(4, last)
    assert checkpoint_steps(tmp_path, n_iters, freq, 4, 4) == {k: min(k * freq, n_iters)}
    message = f"the last checkpoint of training.n_iters={n_iters} steps is number {last}"
    assert caplog.text.count(message) == (last < 4)
    every = {k: min(k * freq, n_iters) for k in range(1, last + 1)}
    assert checkpoint_steps(tmp_path, n_iters, freq, 1, 99) == every


def test_published_files_are_found_by_their_number(tmp_path, caplog):
    """Numbers beyond the configured steps count too, and the last of an uneven number of steps."""
    write_steps(tmp_path, 15, 20, 21, 30, name=lambda step: -(-step // 5))
    assert checkpoint_steps(tmp_path, 21, 5, 3, 9) == {3: 3, 4: 4, 5: 5, 6: 6}
    assert checkpoint_steps(tmp_path, 21, 5, 6, 6) == {6: 6}
    with pytest.raises(FileNotFoundError, match=r"checkpoint_10\.pth to checkpoint_10\.pth"):
        checkpoint_steps(tmp_path, 21, 5, 2, 2)


def test_missing_checkpoints_are_named(tmp_path, caplog):
    write_steps(tmp_path, 4, 8)
    assert checkpoint_steps(tmp_path, 8, 2, 2, 4) == {2: 4, 4: 8}
    assert "checkpoint_6.pth does not exist; passed over" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"for checkpoint_9\.pth to checkpoint_9\.pth"):
        checkpoint_steps(tmp_path, 9, 2, 7, 8)


# --- only regular files are opened ----------------------------------------------------------------


READERS = {
    "checkpoint.pth": load_checkpoint,
    "opened.pth": open_checkpoint,
    "snapshot.pkl": load_checkpoint,
    "model.safetensors": open_checkpoint,
    "arrays.npz": read_arrays,
    "config.json": lambda path: run_config.find(path.parent),
    "settings.json": lambda path: check_settings(path.parent, {}),
}


@pytest.mark.parametrize("name", READERS)
def test_a_fifo_or_device_is_refused_at_once(tmp_path, name):
    """A FIFO keeps its reader waiting for ever; /dev/zero never ends."""
    path = tmp_path / name
    os.mkfifo(path)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} .*no regular file") as error:
            READERS[name](path)
        assert str(error.value).isprintable()
        path.unlink()
        path.symlink_to("/dev/zero")


def test_what_is_written_follows_no_link(tmp_path):
    """Links under the names of temporary and lock files lead out of the folder."""
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_bytes(b"precious")
    folder.mkdir()
    (folder / ".file.partial").symlink_to(precious)
    with atomic_write(folder / "file") as file:
        file.write(b"new")
    assert (folder / "file").read_bytes() == b"new"
    assert not (folder / "file").is_symlink()
    (folder / ".checkpoints.lock").symlink_to(precious)
    os.mkfifo(folder / ".eval.lock")
    for name, says in (("checkpoints", r"\.checkpoints\.lock"), ("eval", "no regular file")):
        place = open_workdir(folder, folder / name)
        with pytest.raises((OSError, ValueError), match=says), place:
            pass
    assert precious.read_bytes() == b"precious"


def test_json_of_more_than_16_mib_is_refused_before_it_is_parsed(tmp_path):
    content = b'{"seed": [' + b"0," * 2**23 + b"0]}"
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is no config: it is larger than 16 MiB"):
        run_config.find(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(ValueError, match="its header is above 16 MiB"):
        open_checkpoint(path)


# --- shared files ---------------------------------------------------------------------------------


def share(path, weights, step=3):
    values = run_config.flatten(digits_ddpmpp.get_config())
    save_shared(path, weights, values, step)
    return path


def test_weights_of_any_kind_are_shared(tmp_path):
    """Transposed, tied and empty tensors, other memory layouts and single numbers are shared."""
    tied = torch.rand(3)
    weights = {
        "transposed": torch.rand(3, 4).T,
        "laid out": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "tied": tied,
        "again": tied,
        "half": torch.rand(7).half(),
        "bfloat16": torch.rand(2, 2).bfloat16(),
        "byte": torch.arange(3, dtype=torch.uint8),
        "whole numbers": torch.arange(5),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
    }
    path = share(tmp_path / "model.safetensors", weights)
    content = path.read_bytes()
    stored, loaded = open_checkpoint(path, intact=True)["model"], load_checkpoint(path)["model"]
    assert stored.keys() == loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert (stored[name].shape, stored[name].dtype) == (weight.shape, weight.dtype)
        assert torch.equal(stored[name].load(), weight) and torch.equal(loaded[name], weight)
    assert share(path, weights).read_bytes() == content  # the order is that of the weights
    library = safetensors.torch.load_file(path)
    assert all(torch.equal(library[name], weight) for name, weight in weights.items())


def test_an_open_shared_file_is_the_file_that_it_was_or_refused(tmp_path):
    path = share(tmp_path / "model.safetensors", {"weight": torch.arange(1000.0)})
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    opened = open_checkpoint(path)
    share(path, {"weight": torch.zeros(9)})
    assert torch.equal(opened["model"]["weight"].load(), torch.arange(1000.0))
    opened = open_checkpoint(path)
    path.unlink()
    assert torch.equal(opened["model"]["weight"].load(), torch.zeros(9))
    opened = open_checkpoint(share(path, {"weight": torch.arange(1000.0)}))
    os.truncate(path, path.stat().st_size - 1)  # a mapped file would end the process by SIGBUS
    with pytest.raises(ValueError, match="it is damaged"):
        opened["model"]["weight"].load()
    del opened  # closes it
    assert before is None or len(os.listdir("/proc/self/fd")) == before


MEMORY = """
import re, sys
from pathlib import Path
import torch
from storage.checkpoints import open_checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

path = Path(sys.argv[1])
torch.rand(10).sum()
before = peak()
weights = open_checkpoint(path, intact=True)["model"]
copies = [weight.load() for weight in weights.values()]
print((peak() - before) / sum(copy.nbytes for copy in copies))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells the memory")
@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors"])
def test_weights_are_in_memory_once(tmp_path, name):
    """Reading 128 MiB takes no second copy: files are checked in pieces; their pages count."""
    weights = {f"weight{number}": torch.rand(2**20) for number in range(32)}
    if name.endswith(".pth"):
        save_checkpoint(tmp_path / name, state() | {"model": weights})
    else:
        share(tmp_path / name, weights)
    done = run_program([sys.executable, "-c", MEMORY, str(tmp_path / name)])
    assert 0.9 < float(done.stdout) < 1.2
