"""DiT: its blocks against their definition, sides, labels, errors, the compiler's graph."""

import math

import numpy as np
import pytest
import torch
from test_configs import load
from test_edm2 import with_gradient
from torch import nn

import models
from models.dit import Block, DiT

pytestmark = pytest.mark.usefixtures("one_thread")


def redrawn(module):
    """`module` in float64, its zeros replaced."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def network(shape=(1, 4, 8), **options):
    options = {"nf": 16, "patch": 2, "depth": 2, "heads": 2} | options
    return redrawn(DiT(shape, shape[0], **options)).eval()


def inputs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.rand(len(x), generator=generator, dtype=torch.float64)


# --- a block, in numpy ----------------------------------------------------------------------------


def normed(h, shift, scale):
    mean, variance = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    return (h - mean) / np.sqrt(variance + 1e-6) * (1 + scale) + shift


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_a_block_is_as_the_paper_has_it():
    block = redrawn(Block(8, 2))
    (h, _), (emb, _) = inputs(3, 5, 8), inputs(3, 8, seed=1)
    w = {name: p.detach().numpy() for name, p in block.named_parameters()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    parts = np.split(linear("modulation", emb.numpy())[:, None], 6, axis=-1)
    shift, scale, gate, shift2, scale2, gate2 = parts
    q, k, v = np.split(linear("qkv", normed(h.numpy(), shift, scale)), 3, axis=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = np.exp(q[..., head] @ k[..., head].swapaxes(1, 2) / math.sqrt(4))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., head])
    expected = h.numpy() + gate * linear("proj", np.concatenate(heads, -1))
    inner = gelu(linear("inner", normed(expected, shift2, scale2)))
    expected = expected + gate2 * linear("outer", inner)
    np.testing.assert_allclose(block(h, emb).detach().numpy(), expected, atol=1e-10)


def test_a_new_block_is_the_identity_and_a_new_network_gives_zero():
    (h, _), (emb, _) = inputs(3, 5, 8), inputs(3, 8, seed=1)
    assert torch.equal(Block(8, 2)(h.float(), emb.float()), h.float())
    x, label = inputs(2, 1, 4, 8)
    assert not DiT((1, 4, 8), 1, 16, 2, 2, 2)(x.float(), label.float()).any()


# --- the network ----------------------------------------------------------------------------------


def test_without_blocks_a_patch_of_the_output_is_of_its_own_patch_and_place():
    net, (x, label) = network(depth=0), inputs(2, 1, 4, 8)
    changed = x.clone()
    changed[:, :, 2:, 4:6] += 1
    difference = net(changed, label) - net(x, label)
    assert (difference[:, :, 2:, 4:6] != 0).all()
    difference[:, :, 2:, 4:6] = 0
    assert not difference.any()
    same = torch.ones_like(x)  # eight equal patches, of eight places
    patches = net(same, label)[0, 0].unflatten(0, (2, 2)).unflatten(2, (4, 2)).transpose(1, 2)
    assert len(patches.reshape(8, 4).unique(dim=0)) == 8


def test_blocks_see_all_patches():
    net, (x, label) = network(), inputs(1, 1, 4, 8)
    x.requires_grad_()
    net(x, label)[0, 0, 0, 0].backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize("sides", [(4, 8), (8, 4), (2, 2), (1, 6)])
def test_sides_of_any_multiples_of_the_patch(sides):
    patch = 1 if 1 in sides else 2
    net, other = network((1, *sides), patch=patch), network((1, 12, 12), patch=patch)
    other.load_state_dict(net.state_dict())  # nothing in it depends on the sides
    x, label = inputs(2, 1, *sides)
    assert net(x, label).shape == x.shape
    assert torch.equal(other(x, label), net(x, label))


def test_each_image_has_its_own_noise_and_class():
    net, (x, label) = network(num_classes=3), inputs(3, 1, 4, 8)
    labels = torch.tensor([0, -1, 2])
    together = net(x, label, labels)
    for i in range(3):
        row = slice(i, i + 1)
        alone = net(x[row], label[row], None if i == 1 else labels[row])
        torch.testing.assert_close(together[row], alone)
    assert not torch.allclose(net(x, label, torch.tensor([1, -1, 2]))[0], together[0])
    assert not torch.allclose(net(x, label + 1, labels), together)


@pytest.mark.parametrize(
    "shape, options, words",
    [
        (
            (1, 4, 7),
            {},
            r"model\.patch=2 does not divide the sides of images of 4 x 7: set",
        ),
        ((1, 4, 8), {"heads": 3}, r"model\.nf=16 must be a multiple of 4, .*of model\.heads=3"),
        ((1, 4, 8), {"nf": 6}, r"model\.nf=6 must be a multiple of 4"),
    ],
)
def test_what_does_not_divide_is_one_line(shape, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        network(shape, **options)
    assert "\n" not in str(caught.value)


def test_other_sides_and_labels_are_refused():
    net = network()
    with pytest.raises(ValueError, match="does not divide the sides of images of 5 x 8"):
        net(*inputs(1, 1, 5, 8))
    with pytest.raises(ValueError, match="takes no class_labels"):
        net(*inputs(1, 1, 4, 8), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("path", ["pfgmpp/digits_dit.py", "edm2/digits.py"])
def test_augmentation_labels_are_refused_before_training(path):
    config = load(path)
    config.model.augment_dim = 9
    with pytest.raises(ValueError, match="takes no augmentation labels: set model.augment_dim=0"):
        models.create_model(config)


def test_blocks_that_run_again_in_backward_give_the_same():
    results = []
    for again in (False, True):
        model = network(checkpoint_activations=again)
        results.append(with_gradient(model, model, *inputs(2, 1, 4, 8)))
    for stored, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, stored)


@pytest.mark.slow
def test_the_network_is_one_graph_for_the_compiler_and_for_export():
    model, arguments = network(num_classes=2, depth=1), (*inputs(2, 1, 4, 8), torch.tensor([0, -1]))
    graph = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    exported = torch.export.export(model, arguments).module()
    expected = with_gradient(model, model, *arguments)
    for compiled, eager in zip(with_gradient(model, graph, *arguments), expected, strict=True):
        torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(exported(*arguments).detach(), expected[0])
