"""Published snapshots are read correctly, and none of their code is run."""

import io
import json
import pickle
import random
import re
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import snapshot_files as files
import torch
from conftest import ROOT
from torch import nn

from storage.edm_configs import config_values
from storage.edm_snapshots import Snapshot, read_snapshot

FORMS = {
    "pkl": lambda path, net: files.save_pickle(path, files.snapshot(net)),
    "pkl of Python 3.7": lambda path, net: files.save_pickle(path, files.snapshot(net), 3),
    "pkl with zips": lambda path, net: with_zipped_storages(path, files.snapshot(net)),
    "pt of PFGM++": lambda path, net: files.save_torch(path, files.training_state(net)),
    "pt of EDM": lambda path, net: files.save_torch(path, {"net": net, "optimizer_state": {}}),
    "pt before 1.6": lambda path, net: files.save_torch(path, files.training_state(net), True),
}


def with_zipped_storages(path, content):
    """A plain pickle whose storages are torch.save's zip files."""

    def load_from_bytes(data):
        raise AssertionError

    load_from_bytes.__module__ = "torch.storage"
    load_from_bytes.__qualname__ = "_load_from_bytes"

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing):
            if not isinstance(thing, torch.storage.TypedStorage):
                return NotImplemented
            data = io.BytesIO()
            torch.save(thing, data)
            return torch.storage._load_from_bytes, (data.getvalue(),)

    with files.published_names(), open(path, "wb") as file:
        Pickler(file, 4).dump(content)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that the source code carried by every module creates."""
    path = tmp_path / "ran"
    monkeypatch.setattr(files.Persistent, "source", f"open({str(path)!r}, 'w').close()")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_options_are_read_and_no_code_is_run(form, tmp_path, trap):
    net, path = files.network(), tmp_path / "snapshot"
    FORMS[form](path, net)
    network, options, weights = read_snapshot(path)
    assert not trap.exists()
    assert network == "EDMPrecond"
    assert options == files.OPTIONS
    expected = net.state_dict()
    assert list(weights) == list(expected)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor)
        assert weights[name].stride() == tensor.stride()
    tied = weights["model.enc.8x8_block0.tied"]
    assert tied.data_ptr() == weights["model.enc.8x8_conv.weight"].data_ptr()


NUMPYS = {
    "img_resolution": (np.int64(8), 8),
    "img_channels": (np.uint8(1), 1),
    "label_dim": (np.array(3, ">i4")[()], 3),
    "model_type": (np.str_("SongUNet"), "SongUNet"),
    "channel_mult": ([np.int32(1), 2, np.int16(2)], [1, 2, 2]),
    "dropout": (np.float32(0.125), 0.125),
    "sigma_max": (np.float64("inf"), float("inf")),
    "use_fp16": (np.bool_(True), True),
    "resample_filter": (torch.Size((1, 3, 3, 1)), (1, 3, 3, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_options_of_numpy_and_torch_are_read(form, tmp_path):
    net, path = files.network(), tmp_path / "snapshot"
    net._init_kwargs = {name: value for name, (value, _) in NUMPYS.items()}
    FORMS[form](path, net)
    options = read_snapshot(path).options
    assert options == {name: plain for name, (_, plain) in NUMPYS.items()}
    for name, (_, plain) in NUMPYS.items():
        assert type(options[name]) is type(plain)
    assert {type(entry) for entry in options["channel_mult"]} == {int}


@pytest.mark.parametrize("protocol", [2, 3, 5])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_options_of_any_numpy_and_pickle_are_read(module, protocol, tmp_path):
    path, net = tmp_path / "snapshot.pkl", files.network()
    net._init_kwargs = {"dropout": np.float64(0.25), "img_resolution": np.int64(8)}
    files.save_pickle(path, files.snapshot(net), protocol)
    content = path.read_bytes()
    if protocol < 4:  # names end with a line
        content = re.sub(rb"numpy\._?core\.multiarray", module, content)
        assert module in content
    path.write_bytes(content)
    assert read_snapshot(path).options == {"dropout": 0.25, "img_resolution": 8}


def test_the_trap_works(tmp_path, trap):
    path = tmp_path / "snapshot.pkl"
    files.save_pickle(path, files.snapshot(files.network()))
    with files.published_names():
        pickle.loads(path.read_bytes())
    assert trap.exists()


def test_ema_is_preferred(tmp_path):
    ema, net = files.network(), files.network()
    for parameter in net.parameters():
        parameter.data.zero_()
    files.save_torch(tmp_path / "a.pt", {"net": net, "ema": ema})
    weights = read_snapshot(tmp_path / "a.pt").weights
    assert torch.equal(weights["model.enc.8x8_conv.weight"], ema.model.enc["8x8_conv"].weight)
    files.save_torch(tmp_path / "a.pt", {"net": net, "ema": None})
    assert not read_snapshot(tmp_path / "a.pt").weights["model.enc.8x8_conv.weight"].any()


def test_nothing_is_imported_executed_or_opened(tmp_path, trap):
    paths = [tmp_path / str(number) for number in range(len(FORMS))]
    for path, save in zip(paths, FORMS.values(), strict=True):
        save(path, files.network())
    paths.append(tmp_path / "hostile")
    files.save_pickle(paths[-1], {"ema": Call(print, "called")})
    program = """
import json, sys
from pathlib import Path
from storage.edm_snapshots import read_snapshot
"".encode("cp437")  # zipfile looks up this codec, which is a module of Python
paths, events = [Path(path) for path in sys.argv[1:]], []
sys.addaudithook(lambda event, args: events.append((event, str(args[0]) if args else "")))
read = 0
for path in paths:
    try:
        read_snapshot(path)
        read += 1
    except ValueError as error:
        refusal = str(error)
seen = list(events)
print(json.dumps([read, refusal, seen]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    read, refusal, events = json.loads(result.stdout)
    assert read == len(FORMS)
    assert "'builtins.print'" in refusal
    events = [event for event in events if event[0] != "builtins.id"]
    assert events == [["open", str(path)] for path in paths for _ in range(2)]  # open and os.open
    assert not trap.exists()


# --- what is refused -----------------------------------------------------------------------------


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize(
    "value",
    [
        np.complex64(1),
        np.datetime64("2020-01-01"),
        np.void(b"abc"),
        np.longdouble(1),
        np.arange(3),
        Call(np.dtype, "O"),
        Call(np.float64(1).__reduce__()[0], np.dtype("f8"), b"short"),
        Call(np.float64(1).__reduce__()[0], np.dtype("f8"), bytes(16)),
        Call(np.float64(1).__reduce__()[0], "f8", bytes(8)),
        Call(np.float64(1).__reduce__()[0], np.dtype("O"), 1),
        Call(torch.Size, 3),
        Call(torch.Size, ["a", b"b"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_of_numpy_are_named(value, tmp_path):
    net = files.network()
    net._init_kwargs = {"dropout": value}
    files.save_pickle(tmp_path / "snapshot.pkl", files.snapshot(net))
    try:
        options = read_snapshot(tmp_path / "snapshot.pkl").options
    except ValueError as error:
        assert str(error).isprintable()
    else:
        assert options == {"dropout": 3}


def refusal(path, content=None):
    """The one line with which the file at `path`, of this `content`, is refused."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        files.save_pickle(path, content)
    with pytest.raises(ValueError, match="is no snapshot of EDM or PFGM") as caught:
        read_snapshot(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message


def changed(**attributes):
    """A network with other attributes than a module's own."""
    net = files.network()
    net.__dict__.update(attributes)
    return {"ema": net}


def test_what_is_no_network_is_named(tmp_path):
    path = tmp_path / "a.pkl"
    assert "ema is 'builtins.eval', not a module" in refusal(path, {"ema": Call(eval, "1")})
    assert "ema is int" in refusal(path, {"ema": 3})
    assert "neither `ema` nor `net`" in refusal(path, {"model": 3})
    assert "it holds list" in refusal(path, [3])
    hooks = changed(_parameters={"w": Call(exec, "1")})
    assert "ema.w is 'builtins.exec', not a tensor" in refusal(path, hooks)
    assert "ema.w is int, not a tensor" in refusal(path, changed(_buffers={"w": 1}))
    assert "ema.m is StoredView, not a module" in refusal(
        path, changed(_modules={"m": torch.ones(2)})
    )
    assert "_parameters without a proper name" in refusal(path, changed(_parameters={"a\n": None}))
    assert "option 'a' holds 'builtins.getattr'" in refusal(
        path, changed(_init_kwargs={"a": [1, Call(getattr, 1, "x")]})
    )
    assert "options that have no names" in refusal(path, changed(_init_args=(32,)))
    assert "have no names" in refusal(path, changed(_init_kwargs=[1]))
    assert "option 'a' holds bytes" in refusal(path, changed(_init_kwargs={"a": b"a"}))
    sparse = torch.eye(2).to_sparse()
    assert "'torch._utils._rebuild_sparse_tensor'" in refusal(path, changed(_buffers={"a": sparse}))
    complex_numbers = torch.ones(2, dtype=torch.complex64)
    assert "'torch.ComplexFloatStorage'" in refusal(path, changed(_buffers={"a": complex_numbers}))


def test_what_is_no_file_of_the_kind(tmp_path):
    path = tmp_path / "a.pkl"
    with pytest.raises(FileNotFoundError):
        read_snapshot(path)
    refusal(path, b"")
    refusal(path, b"<html>\n")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/0.png", b"0")
    assert "it has no data.pkl" in refusal(path)
    files.save_torch(path, {"ema": files.network()})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "is compressed" in refusal(tmp_path / "b")


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"\x8a\xff", "long1"),
        (b"\x8b\xff\xff\xff\x7f", "long4"),
        (b"\x82\x01", "EXT1"),
        (b"ios\nsystem\n", "INST"),
        (b"Vtext\n", "UNICODE"),
        (b"I1\n", "INT"),
        (b"P1\n", "PERSID"),
        (b"(os\n", "OBJ"),
        (b"\x97", "NEXT_BUFFER"),
        (b"NQ", "outside of it"),
        (b"N)R", "REDUCE at byte 4 cannot"),
        (b"0", "POP at byte 2 cannot"),
        (b"(0", "POP at byte 3 cannot"),
        (b"t", "TUPLE at byte 2 cannot"),
        (b"h\x01", "BINGET at byte 2 cannot"),
        (b"]N.", "it holds NoneType"),
        (b"}(Nu", "SETITEMS at byte 5 cannot"),
        (b"})Ns", "no string and no small number"),
        (b"}\x8a\x08\0\0\0\0\0\0\0\x20Ns", "no string and no small number"),
        (b"NNa", "APPEND at byte 4 cannot"),
        (b"NNNs", "SETITEM at byte 5 cannot"),
        (b"NNb", "BUILD at byte 4 cannot"),
        (b"cos\nsystem\nNR", "REDUCE at byte 14 cannot"),
        (b"ccollections\nOrderedDict\n]\x85R", "REDUCE at byte 29 cannot"),
        (b"\x8e\0\0\0\0\0\0\0\x10", "1152921504606846976 bytes"),
        (b"\xff", r"opcode b'\xff' unknown"),
    ],
)
def test_operations_that_are_not_read(code, name, tmp_path):
    assert name in refusal(tmp_path / "a.pkl", b"\x80\x04" + code + b".")


def tensor(offset=0, size=(2, 3), stride=(3, 1), numel=6, storage=None, metadata=None):
    storage = torch.zeros(numel)._typed_storage() if storage is None else storage
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {}, metadata)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"offset": 1}, "beyond its memory"),
        ({"offset": -1}, "shape"),
        ({"size": (3, 3)}, "beyond its memory"),
        ({"size": (2, -3)}, "shape"),
        ({"size": (2, 3.0)}, "shape"),
        ({"size": (2, True)}, "shape"),
        ({"size": [2, 3]}, "shape"),
        ({"size": (2,)}, "shape"),
        ({"size": (0, 2**62)}, "shape"),
        ({"size": (1,) * 9, "stride": (1,) * 9}, "shape"),
        ({"size": (0, 3), "offset": 7}, "beyond its memory"),
        ({"stride": (4, 1)}, "beyond its memory"),
        ({"stride": (-3, 1)}, "shape"),
        ({"size": (2**39,), "stride": (0,)}, "beyond its memory"),
        ({"metadata": {"neg": True}}, "a tensor has metadata"),
        ({"storage": b"123456"}, "the memory of a tensor is bytes"),
    ],
)
def test_tensors_that_do_not_lie_in_their_memory(options, reason, tmp_path):
    path = tmp_path / "a.pkl"
    files.save_pickle(path, changed(_buffers={"a": tensor()}))
    assert torch.equal(read_snapshot(path).weights["a"], torch.zeros(2, 3))
    assert reason in refusal(path, changed(_buffers={"a": tensor(**options)}))


def nested(depth, inner):
    for _ in range(depth):
        inner = (inner,)
    return inner


def test_bombs(tmp_path):
    """Small files that would become large in memory, deep, or slow."""
    path, start = tmp_path / "a.pkl", time.perf_counter()
    laughs = ["lol"]
    for _ in range(40):
        laughs = [laughs, laughs]
    assert "option 'a' holds list" in refusal(path, changed(_init_kwargs={"a": laughs}))
    assert "option 'a' holds dict" in refusal(path, changed(_init_kwargs={"a": {"b": 1}}))
    assert "option 'a' holds tuple" in refusal(path, changed(_init_kwargs={"a": nested(30, 1)}))
    many = dict.fromkeys(map(str, range(1000)), ["x"] * 1000)
    assert "too many options" in refusal(path, changed(_init_kwargs=many))
    deep = b"\x80\x04" + b"N" + b"\x85" * 500_000
    assert "it holds tuple" in refusal(path, deep + b".")
    assert "a key that is no string" in refusal(path, deep.replace(b"N", b"}N", 1) + b"Ns.")
    cycle = []
    cycle.append(cycle)
    assert "option 'a' holds list" in refusal(path, changed(_init_kwargs={"a": cycle}))
    assert "too many operations" in refusal(path, b"\x80\x04" + b"]" * 1_500_000)

    shared = nn.ModuleDict()
    for _ in range(40):
        shared = nn.ModuleDict({"a": shared, "b": shared})
    assert "more than" in refusal(path, changed(_modules={"a": shared}))
    twice = nn.Linear(1, 1)
    assert "no module of its own" in refusal(path, changed(_modules={"a": twice, "b": twice}))
    cyclic = nn.ModuleDict()
    cyclic._modules["a"] = cyclic
    assert "no module of its own" in refusal(path, changed(_modules={"a": cyclic}))

    names = {"_non_persistent_buffers_set": set(map(str, range(1000)))}
    assert "_non_persistent_buffers_set" in refusal(path, changed(**names))
    long = b"X\xa0\x86\x01\0" + b"x" * 100_000 + b"q\0"  # joined 100,000 times: 20 GB
    assert "too long" in refusal(path, b"\x80\x04" + long + b"h\0h\0\x93" * 100_000 + b".")
    data = io.BytesIO()
    torch.save(torch.zeros(100_000)._typed_storage(), data, _use_new_zipfile_serialization=False)
    storage = Call(torch.storage._load_from_bytes, data.getvalue())
    # Twenty calls with one object, which the file has once.
    calls = {f"a{i}": tensor(storage=Call(storage.function, *storage.args)) for i in range(20)}
    files.save_pickle(path, changed(_buffers=calls))
    weights = read_snapshot(path).weights
    assert len({weights[name].data_ptr() for name in calls}) == 1
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("form", FORMS)
def test_memory(form, tmp_path):
    net, path = files.network(), tmp_path / "a"
    net.model.large = nn.Parameter(torch.zeros(2**22), requires_grad=False)
    FORMS[form](path, net)
    del net
    tracemalloc.start()
    read_snapshot(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    copies = 3 if form == "pkl with zips" else 2
    assert peak < (copies + 0.1) * path.stat().st_size


def test_overlapping_records_of_a_zip_file(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x04N." + b"\0" * 1000)
        info = archive.filelist[0]
        for number in range(50):
            copy = zipfile.ZipInfo(f"a/data/{number}")
            copy.header_offset, copy.CRC = info.header_offset, info.CRC
            copy.compress_size = copy.file_size = 1004
            archive.filelist.append(copy)
    assert "records are larger than the file" in refusal(path)


# --- the config of a snapshot --------------------------------------------------------------------

# The published CIFAR-10 networks: options as in EDM's train.py.
DDPMPP = {
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 10,
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "augment_dim": 9,
    "dropout": 0.13,
    "use_fp16": False,
}
NCSNPP = DDPMPP | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def config_of(**options):
    return config_values(Snapshot("EDMPrecond", options, {}))


def test_config_of_published_networks():
    ddpmpp = {
        "training.sde": "edm",
        "data.image_size": 32,
        "data.num_channels": 3,
        "data.num_classes": 10,
        "model.name": "edm_unet",
        "model.nf": 128,
        "model.ch_mult": (2, 2, 2),
        "model.num_res_blocks": 4,
        "model.attn_resolutions": (16,),
        "model.dropout": 0.13,
        "model.augment_dim": 9,
        "model.sigma_data": 0.5,
        "model.embedding_type": "positional",
        "model.progressive": "none",
        "model.progressive_input": "none",
        "model.fir": False,
    }
    assert config_of(**DDPMPP) == ddpmpp
    assert config_of(**NCSNPP) == ddpmpp | {
        "model.embedding_type": "fourier",
        "model.progressive_input": "residual",
        "model.fir": True,
        "model.fir_kernel": (1, 3, 3, 1),
    }
    pfgmpp = config_of(**DDPMPP, pfgm=False, pfgmpp=True, D=2048)
    assert pfgmpp == ddpmpp | {"training.sde": "pfgmpp", "model.D": 2048.0}
    # ImageNet 64: the class's own defaults but for the labels.
    adm = config_of(img_resolution=64, img_channels=3, label_dim=1000, augment_dim=None)
    assert adm == {
        "training.sde": "edm",
        "data.image_size": 64,
        "data.num_channels": 3,
        "data.num_classes": 1000,
        "model.name": "adm",
        "model.nf": 192,
        "model.ch_mult": (1, 2, 3, 4),
        "model.num_res_blocks": 3,
        "model.attn_resolutions": (32, 16, 8),
        "model.dropout": 0.1,
        "model.augment_dim": 0,
        "model.sigma_data": 0.5,
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "VGG"}, "'VGG'"),
        ({"model_type": ["SongUNet"]}, "SongUNet"),
        ({"depth": 3}, "'depth'"),
        ({"channel_mult_emb": 2}, "channel_mult_emb"),
        ({"channel_mult_noise": 2}, "channel_mult_noise"),
        ({"img_resolution": None}, "img_resolution"),
        ({"channel_mult": 3}, "damaged"),
        ({"encoder_type": []}, "damaged"),
        ({"pfgm": True}, "EDMPrecond"),
    ],
)
def test_options_without_a_config_are_named(options, named):
    with pytest.raises(ValueError, match=named) as caught:
        config_of(**DDPMPP | options)
    assert "\n" not in str(caught.value)


# --- damage --------------------------------------------------------------------------------------


def mutations(content, count, seed=0):
    """Damaged copies: changed bytes, also into operations, cut, doubled and exchanged pieces."""
    chance = random.Random(seed)
    opcodes = b"().0123]}abehjlnqrstuBCKMNJGQRTUVX\x80\x81\x85\x86\x87\x88\x8c\x8e\x8f\x93\x94\x95"
    for number in range(count):
        damaged, place = bytearray(content), chance.randrange(len(content))
        other, length = chance.randrange(len(content)), chance.randrange(1, 40)
        match number % 6:
            case 0:
                damaged[place] ^= 1 << chance.randrange(8)
            case 1:
                damaged[place] = chance.choice(opcodes)
            case 2:
                del damaged[place:]
            case 3:
                del damaged[place : place + length]
            case 4:
                damaged[place:place] = content[other : other + length]
            case 5:
                damaged[place], damaged[other] = damaged[other], damaged[place]
        yield bytes(damaged)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_load_or_are_refused_in_one_line(form, tmp_path, trap):
    """200 of each form. A zip file has checksums, so what loads of it is as it was."""
    path, net = tmp_path / "a", files.network()
    FORMS[form](path, net)
    content, expected = path.read_bytes(), net.state_dict()
    outcomes, start = {"read": 0, "refused": 0}, time.process_time()
    tracemalloc.start()
    for damaged in mutations(content, 200):
        path.write_bytes(damaged)
        try:
            network, options, weights = read_snapshot(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is no snapshot of EDM or PFGM++: ")
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        json.dumps(options)
        for tensor in weights.values():
            assert type(tensor) is torch.Tensor
            tensor.double().sum()
        if form in ("pt of PFGM++", "pt of EDM"):
            assert list(weights) == list(expected)
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
            assert options == files.OPTIONS
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(outcomes.values()) > 5
    assert not trap.exists()
    assert peak < 2**20
    assert time.process_time() - start < 20
