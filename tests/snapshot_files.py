"""Files in the shape of EDM's (EDM2's) and PFGM++'s snapshots, whose source runs on loading.

The published classes write themselves as a call of `torch_utils.persistence`, with the source code
of their module and their attributes as its argument. Here are classes that do the same.
"""

import collections
import contextlib
import pickle
import sys
import types

import torch
from torch import nn


def _reconstruct_persistent_obj(meta):
    """Run the source that the file carries, as EDM does; the readers under test must not."""
    scope = {}
    exec(meta["module_src"], scope)  # noqa: S102
    return meta


class EasyDict(dict):
    """A dictionary of the published programs' own class."""


class Persistent(nn.Module):
    """A module that is pickled as the published ones are."""

    source = ""  # of the Python module that it carries
    class_name = "Block"

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": Persistent.source,
            "class_name": self.class_name,
            "state": self.__dict__,
        }
        return _reconstruct_persistent_obj, (meta,), None


class EDMPrecond(Persistent):
    class_name = "EDMPrecond"

    def __init__(self, model, **options):
        super().__init__()
        self.model = model
        self._init_args, self._init_kwargs = (), options


OPTIONS = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 0,
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "channel_mult": [1, 2],
    "dropout": 0.13,
    "sigma_max": float("inf"),
    "use_fp16": False,
    "augment_dim": None,
    "resample_filter": (1, 3, 3, 1),
}


def network() -> EDMPrecond:
    """A small one: modules in modules, half precision, a transposed weight, tied ones, buffers."""
    random = torch.Generator().manual_seed(0)

    def parameter(*shape, dtype=torch.float32):
        return nn.Parameter(torch.randn(shape, generator=random).to(dtype), requires_grad=False)

    block = Persistent()
    block.weight = parameter(5, 3, 2)
    block.fp16 = parameter(7, dtype=torch.float16)
    block.bf16 = parameter(3, dtype=torch.bfloat16)
    block.bias = None
    block.transposed = nn.Parameter(torch.randn(4, 6, generator=random).t())
    block.scalar = parameter()
    block.empty = parameter(0, 3)
    block.register_parameter("absent", None)
    block.register_buffer("resample_filter", torch.arange(4, dtype=torch.int64))
    block.register_buffer("transient", torch.zeros(2), persistent=False)
    memory = torch.randn(12, generator=random)
    block.register_buffer("first", memory[:5])
    block.register_buffer("second", memory[3:].view(3, 3).t())
    model = Persistent()
    model.map_layer0 = nn.Linear(3, 2)
    model.map_layer0.weight.data.normal_(generator=random)
    model.map_layer0.bias.data.normal_(generator=random)
    model.enc = nn.ModuleDict({"8x8_conv": block, "8x8_block0": Persistent()})
    model.enc["8x8_block0"].tied = block.weight
    return EDMPrecond(model, **OPTIONS)


def published_network(weights: dict, options: dict, class_name="EDMPrecond") -> EDMPrecond:
    """The network with these options and, under the names of its state dict, these weights."""
    net = EDMPrecond(Persistent(), **options)
    net.class_name = class_name
    for name, tensor in weights.items():
        *path, leaf = name.split(".")
        owner = net
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, Persistent())
            owner = owner._modules[part]
        if leaf in ("freqs", "phases", "resample_filter"):
            owner.register_buffer(leaf, tensor)
        else:
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return net


class EDMLoss:
    """An object of the snapshot that is no module, and of a class that nobody has."""

    def __init__(self):
        self.P_mean, self.ignored = -1.2, {"path": collections.Counter("abc")}


@contextlib.contextmanager
def published_names():
    """Pickles name the published modules; they are importable within the `with` block only."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    loss = types.ModuleType("training.loss")
    parents = {name: types.ModuleType(name) for name in ("torch_utils", "dnnlib", "training")}
    named = [
        (persistence, _reconstruct_persistent_obj),
        (util, EasyDict),
        (loss, EDMLoss),
    ]
    before = [(thing, thing.__module__) for _, thing in named]
    modules = parents | {module.__name__: module for module, _ in named}
    sys.modules.update(modules)
    for module, thing in named:
        thing.__module__ = module.__name__
        setattr(module, thing.__name__, thing)
    try:
        yield
    finally:
        for thing, name in before:
            thing.__module__ = name
        for name in modules:
            del sys.modules[name]


def save_pickle(path, content, protocol=4):
    """Write `content` as a network snapshot: a plain pickle."""
    with published_names():
        path.write_bytes(pickle.dumps(content, protocol))


def save_torch(path, content, legacy=False):
    """Write `content` as a training state: a file of torch.save."""
    with published_names():
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def snapshot(net) -> dict:
    """Content of a network snapshot."""
    options = EasyDict(path="cifar10.zip", use_labels=False)
    return {"ema": net, "loss_fn": EDMLoss(), "augment_pipe": None, "dataset_kwargs": options}


def training_state(net) -> dict:
    """Content of PFGM++'s training state; EDM's has `net` instead of `ema`, and no `step`."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.numel()], lr=1e-3)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in net.parameters():
        parameter.grad = None
    return {"optimizer_state": optimizer.state_dict(), "step": 200_000, "ema": net}
