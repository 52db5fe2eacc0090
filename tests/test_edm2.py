"""EDM2's network against the published one, and its layers against their definitions."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import objective_of
from reference_weights import case_arrays, weight
from test_configs import load
from torch import nn

import execution
import models
from models.edm2 import Block, EDM2UNet
from models.magnitude import (
    MPFourier,
    MPLayer,
    mp_cat,
    mp_silu,
    mp_sum,
    normalise_weights,
    unit_magnitude,
)

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = json.loads((GOLDEN / "edm2.json").read_text())
CASES = PUBLISHED["cases"]

pytestmark = pytest.mark.usefixtures("one_thread")

# {option of EDM2: argument here}
ARGUMENTS = {
    "img_resolution": "image_size",
    "label_dim": "num_classes",
    "model_channels": "nf",
    "channel_mult": "ch_mult",
    "num_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "channels_per_head": "head_width",
    "channel_mult_noise": "noise_mult",
    "channel_mult_emb": "emb_mult",
    "label_balance": "label_balance",
    "concat_balance": "concat_balance",
    "res_balance": "res_balance",
    "attn_balance": "attn_balance",
    "clip_act": "clip",
}


def case_weights(case):
    return {name: published_weight(name, shape) for name, shape in CASES[case]["state"]}


def published_weight(name, shape):
    """A published weight, drawn as the README of the reference numbers says."""
    leaf, draws = name.rpartition(".")[2], np.random.RandomState(zlib.crc32(name.encode()))
    if leaf == "freqs":
        return torch.from_numpy(2 * math.pi * draws.standard_normal(shape)).float()
    if leaf == "phases":
        return torch.from_numpy(2 * math.pi * draws.uniform(size=shape)).float()
    if not shape:
        return torch.tensor(0.7 if leaf == "out_gain" else 0.3)
    return weight(name, tuple(shape))


def case_model(case):
    options = CASES[case]["options"]
    arguments = {name: options[key] for key, name in ARGUMENTS.items() if key in options}
    channels = options["img_channels"]
    model = EDM2UNet(channels=channels, out_channels=channels, **arguments).eval()
    models.load_reference_state_dict(model, case_weights(case))
    return model


def case_inputs(case):
    return case_arrays("edm2.npz", case)


def denoised(model, inputs, sd, class_labels):
    x, sigma = inputs["x"], inputs["sigma"][:, None, None, None]
    norm = (sigma**2 + sd**2).sqrt()
    out = model(x / norm, inputs["sigma"].log() / 4, class_labels)
    return (sd / norm) ** 2 * x + sigma * sd / norm * out


def close(actual, published, tolerance=1e-5):
    scale = published.abs().max().item()
    torch.testing.assert_close(actual, published, rtol=0, atol=tolerance * scale)


# --- the published numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_published_ones(case):
    model, inputs = case_model(case), case_inputs(case)
    sd, labels = CASES[case]["options"]["sigma_data"], inputs["labels"]
    with torch.no_grad():
        close(model(inputs["x"], inputs["sigma"].log() / 4, labels), inputs["raw"])
        close(denoised(model, inputs, sd, labels), inputs["denoised"])
        for none in (None, None if labels is None else torch.full_like(labels, -1)):
            close(denoised(model, inputs, sd, none), inputs["denoised_nolabel"])


@pytest.mark.parametrize("case", CASES)
def test_training_normalises_the_stored_weights_as_published(case):
    model, inputs = case_model(case), case_inputs(case)
    for block in model.modules():
        if isinstance(block, Block):
            block.dropout = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sd, labels = CASES[case]["options"]["sigma_data"], inputs["labels"]
    with torch.no_grad():
        close(denoised(model.train(), inputs, sd, labels), inputs["denoised_train"])
    close(model.encoder[0]["block0"].conv_res0.weight.detach(), inputs["normalised"])
    for name, value in model.state_dict().items():
        layer = value.ndim > 1
        assert torch.equal(value, before[name]) != layer, name
        if layer:
            size = magnitude(value.flatten(1), 1)  # 1e-4 is added to what divides it
            torch.testing.assert_close(size, torch.ones_like(size), rtol=5e-3, atol=0)
    in_training = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        close(denoised(model.eval(), inputs, sd, labels), inputs["denoised_train"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, in_training[name]), name


@pytest.mark.parametrize("size", ["xs", "s"])
def test_full_size_names_and_shapes(size):
    expected = {name: tuple(shape) for name, shape in PUBLISHED["full"][f"imagenet64_{size}"]}
    expected = {name: shape for name, shape in expected.items() if not name.startswith("logvar")}
    with torch.device("meta"):
        model = models.create_model(load(f"edm2/imagenet64_{size}.py"))
    names, parameters = models.reference_names(model), dict(model.named_parameters())
    assert {name: tuple(parameters[key].shape) for name, key in names.items()} == expected
    assert list(names) == list(expected)
    assert list(names.values()) == list(parameters)
    fixed = {name for name, p in parameters.items() if not p.requires_grad}
    assert fixed == {"emb_fourier.freqs", "emb_fourier.phases"}
    assert model.remarks == []


# Millions of parameters, learning rate, dropout, millions of images of training. Source: arXiv
# 2312.02696, tables 2 and 6; of XS the learning rate is that of the reference numbers.
SIZES = {
    "xs": (124.7, 0.012, 0.0, 1073.7),
    "s": (280.2, 0.010, 0.0, 1073.7),
    "m": (497.8, 0.009, 0.1, 2147.5),
    "l": (777.5, 0.008, 0.1, 1073.7),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_sizes_are_those_of_the_paper(size):
    config = load(f"edm2/imagenet64_{size}.py")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in models.create_model(config).parameters())
        parameters += sum(p.numel() for p in objective_of(config).parameters())
    training, optim, model = config.training, config.optim, config.model
    images = training.n_iters * training.batch_size / 1e6
    published = SIZES[size]
    assert round(parameters / 1e6, 1) == published[0]
    assert (optim.lr, model.dropout, round(images, 1)) == published[1:]
    assert optim.warmup * training.batch_size == pytest.approx(10e6, rel=1e-3)
    assert (training.batch_size, optim.decay_from, optim.beta2) == (2048, 35_000, 0.99)
    assert (model.P_mean, model.P_std, model.ema_stds) == (-0.8, 1.6, (0.05, 0.1))
    assert training.n_iters == training.snapshot_freq * config.eval.end_ckpt
    assert config.sampling.N == 32 and config.training.objective == "uncertainty"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_prefixes_and_the_uncertainty_are_accepted(prefix):
    weights = {prefix + name: value for name, value in case_weights("cond").items()}
    assert f"{prefix}logvar_linear.weight" in weights
    model = case_model("cond")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    models.load_reference_state_dict(model, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda w: {k: v for k, v in w.items() if k != "unet.out_gain"}, "lack 'unet.out_gain'"),
        (lambda w: w | {"unet.enc.4x4_block7.emb_gain": torch.ones(())}, "unknown 'unet.enc.4x4_b"),
        (
            lambda w: w | {"unet.emb_noise.weight": torch.ones(32, 15)},
            r"'unet.emb_noise.weight' has the shape \(32, 15\), not \(32, 16\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_wrong_weights_are_named(change, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        models.load_reference_state_dict(case_model("uncond"), change(case_weights("uncond")))
    assert "\n" not in str(caught.value)


def test_weights_for_images_of_another_size_are_matched_by_level():
    shapes = {name: tuple(shape) for name, shape in CASES["cond"]["state"]}  # of sides 16, 8 and 4
    model = EDM2UNet(image_size=32, nf=16, ch_mult=(1, 2, 2), num_res_blocks=2, num_classes=4)
    pairs = models.published.match_names(model, shapes)
    assert pairs["encoder.1.down.conv_res0.weight"] == "unet.enc.8x8_down.conv_res0.weight"
    assert pairs["decoder.0.in0.emb_gain"] == "unet.dec.4x4_in0.emb_gain"
    assert pairs["decoder.2.block2.conv_skip.weight"] == "unet.dec.16x16_block2.conv_skip.weight"
    assert pairs["emb_label.weight"] == "unet.emb_label.weight"
    of_network = {name: published for name, published in pairs.items() if published in shapes}
    assert len(of_network) == len(shapes) - 3  # all but the three of the uncertainty


# --- layers against their definitions, in float64 -------------------------------------------------


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit_rows(weight):
    """Each output's weights over their root mean square, the published 1e-4 added."""
    rows = [row / (1e-4 + math.sqrt((row**2).mean())) for row in weight]
    return np.stack(rows)


def test_a_convolution_is_a_sum_over_padded_windows():
    layer, x = MPLayer(2, 3, size=3).double(), randn(1, 2, 4, 5)
    expected = np.zeros((1, 3, 4, 5))
    kernel = unit_rows(layer.weight.detach().numpy()) * 0.7 / math.sqrt(2 * 9)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    for out, row, column in np.ndindex(3, 4, 5):
        window = padded[0, :, row : row + 3, column : column + 3]
        expected[0, out, row, column] = (kernel[out] * window).sum()
    np.testing.assert_allclose(layer(x, torch.tensor(0.7)).detach().numpy(), expected, atol=1e-12)


def test_a_linear_layer_is_a_product():
    layer, x = MPLayer(6, 3).double(), randn(2, 6)
    expected = x.numpy() @ unit_rows(layer.weight.detach().numpy()).T / math.sqrt(6)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-12)


def test_sums_concatenations_and_activations_are_those_of_the_paper():
    a, b, t = randn(2, 3, 4, 4), randn(2, 5, 4, 4, seed=1), 0.3
    weights = math.sqrt(8 / (0.7**2 + 0.3**2))
    expected = [weights * 0.7 / math.sqrt(3) * a, weights * 0.3 / math.sqrt(5) * b]
    torch.testing.assert_close(mp_cat(a, b, t), torch.cat(expected, 1))
    total = (0.7 * a + 0.3 * b[:, :3]) / math.sqrt(0.7**2 + 0.3**2)
    torch.testing.assert_close(mp_sum(a, b[:, :3], t), total)
    torch.testing.assert_close(mp_silu(a), a / (1 + (-a).exp()) / 0.596)
    pixels = a / (1e-4 + a.square().mean(1, keepdim=True).sqrt())
    torch.testing.assert_close(unit_magnitude(a, 1), pixels)
    fourier = MPFourier(4).double()
    angles = a[0, 0, :, 0, None] * fourier.freqs + fourier.phases
    torch.testing.assert_close(fourier(a[0, 0, :, 0]), math.sqrt(2) * torch.cos(angles))


def block(**changes):
    options = {"dropout": 0.0, "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3}
    options |= {"clip": 256.0, "encodes": True} | changes
    return Block(8, 8, 6, **options).double().eval()


def test_attention_is_by_cosines():
    attending, x = block(heads=2), randn(2, 8, 3, 3)
    attention, flat = attending._attention(x).detach(), x.flatten(2).numpy()
    qkv = unit_rows(attending.attn_qkv.weight.detach().numpy())[..., 0, 0] / math.sqrt(8)
    proj = unit_rows(attending.attn_proj.weight.detach().numpy())[..., 0, 0] / math.sqrt(8)
    for image in range(2):
        heads = []
        for head in range(2):  # 4 channels a head; each has a query, a key and a value in turn
            q, k, v = (
                qkv[12 * head + part : 12 * head + 12 : 3] @ flat[image] for part in range(3)
            )
            q, k, v = (m / (1e-4 + np.sqrt((m**2).mean(0))) for m in (q, k, v))
            scores = np.exp(q.T @ k / math.sqrt(4))
            heads.append(v @ (scores / scores.sum(1, keepdims=True)).T)
        expected = (proj @ np.concatenate(heads)).reshape(8, 3, 3)
        np.testing.assert_allclose(attention[image].numpy(), expected, atol=1e-10)


def test_a_block_clips_its_output():
    clipping, x, emb = block(clip=0.5), randn(2, 8, 4, 4), randn(2, 6)
    free = block()
    free.load_state_dict(clipping.state_dict())
    assert free(x, emb).abs().max() > 1
    torch.testing.assert_close(clipping(x, emb), free(x, emb).clamp(-0.5, 0.5))


# --- magnitudes -----------------------------------------------------------------------------------


def magnitude(x, *dims):
    return x.square().mean(dims or None).sqrt()


def test_a_convolution_keeps_the_magnitude_but_at_padded_borders():
    """A window has 9 pixels, of which 6 are inside at an edge and 4 in a corner."""
    torch.manual_seed(0)
    with torch.no_grad():
        size = magnitude(MPLayer(64, 512, 3)(torch.randn(64, 64, 4, 4)), 0, 1)
    edge, corner = math.sqrt(6 / 9), math.sqrt(4 / 9)
    ends = torch.tensor([corner, edge, edge, corner])
    inside = torch.tensor([edge, 1, 1, edge])
    torch.testing.assert_close(size, torch.stack([ends, inside, inside, ends]), rtol=0.02, atol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_layers_keep_the_magnitude_whatever_that_of_their_weights(scale):
    torch.manual_seed(0)
    layer, pointwise = MPLayer(256, 256), MPLayer(256, 256, 1)
    with torch.no_grad():
        for each in (layer, pointwise):
            each.weight.mul_(scale)
        assert magnitude(layer(torch.randn(256, 256))) == pytest.approx(1, rel=0.02)
        assert magnitude(pointwise(torch.randn(8, 256, 8, 8))) == pytest.approx(1, rel=0.02)


def test_other_layers_keep_the_magnitude():
    torch.manual_seed(0)
    a, b = torch.randn(64, 32, 16, 16), torch.randn(64, 96, 16, 16)
    for t in (0.0, 0.3, 0.5, 1.0):
        assert magnitude(mp_sum(a, b[:, :32], t)) == pytest.approx(1, rel=0.01)
        joined = mp_cat(a, b, t)
        assert magnitude(joined) == pytest.approx(1, rel=0.01)
        first, second = (joined[:, part].square().sum() for part in (slice(32), slice(32, None)))
        assert first.sqrt() * t == pytest.approx((second.sqrt() * (1 - t)).item(), rel=0.02)
    assert magnitude(mp_silu(a)) == pytest.approx(1, rel=0.01)
    pixels = magnitude(unit_magnitude(7 * a, 1), 1)
    torch.testing.assert_close(pixels, torch.ones_like(pixels), rtol=1e-3, atol=0)
    assert magnitude(MPFourier(256)(torch.randn(256))) == pytest.approx(1, rel=0.02)


def test_a_network_keeps_the_magnitude_at_its_start():
    """Its last convolution, with a gain of 1, gives what a unit input would, but for padding."""
    torch.manual_seed(0)
    model = EDM2UNet(image_size=16, nf=64, ch_mult=(1, 2), num_res_blocks=1, channels=3)
    assert not model(torch.randn(2, 3, 16, 16), torch.randn(2)).any()  # the gain is 0 at first
    nn.init.ones_(model.out_gain)
    with torch.no_grad():
        out = model.eval()(torch.randn(8, 3, 16, 16), torch.randn(8))
    assert 0.7 < magnitude(out) < 1.3


def test_a_gradient_is_orthogonal_to_the_weights_of_its_output():
    """A gradient is orthogonal to weights whose length has no effect; a step lengthens them."""
    layer, x = MPLayer(6, 5, size=3).double(), randn(2, 6, 4, 4)
    (layer(x) * randn(2, 5, 4, 4, seed=1)).sum().backward()
    along = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    lengths = layer.weight.flatten(1).norm(dim=1) * layer.weight.grad.flatten(1).norm(dim=1)
    assert (along.abs() < 1e-3 * lengths).all()  # 1e-4 is added to the root mean square


def test_normalising_twice_is_normalising_once():
    torch.manual_seed(0)
    layer = MPLayer(6, 5, size=3)
    nn.init.normal_(layer.weight, std=3.0)
    normalise_weights(layer)
    once = layer.weight.detach().clone()
    normalise_weights(layer)
    torch.testing.assert_close(layer.weight.detach(), once, rtol=1e-4, atol=0)


# --- options --------------------------------------------------------------------------------------


def test_heads_are_whole():
    with pytest.raises(ValueError, match=r"model\.head_width=40 makes no whole heads of 130"):
        EDM2UNet(image_size=8, nf=130, ch_mult=(1,), head_width=40)


def test_labels_without_classes_are_refused():
    model, x = EDM2UNet(image_size=8, nf=8, ch_mult=(1,), num_res_blocks=1), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="takes no class_labels"):
        model(x, torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.int64))


def randomised(**options):
    """A small network whose gains are not 0."""
    torch.manual_seed(0)
    options = {"image_size": 8, "nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1} | options
    model = EDM2UNet(channels=1, out_channels=1, head_width=16, attn_resolutions=(4,), **options)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            nn.init.constant_(parameter, 0.5)
    return model


def with_gradient(model, run, *inputs):
    model.zero_grad()
    out = run(*inputs)
    out.square().sum().backward()
    return out.detach(), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    )


@pytest.mark.parametrize("training", [True, False])
def test_blocks_that_run_again_in_backward_give_the_same(training):
    results, inputs = [], (torch.randn(2, 1, 8, 8), torch.ones(2))
    for again in (False, True):
        model = randomised(dropout=0.5, checkpoint_activations=again).train(training)
        torch.manual_seed(1)
        results.append(with_gradient(model, model, *inputs))
    for stored, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, stored, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near(one_thread):
    if not execution.has_precision("bf16", torch.device("cpu")):
        pytest.skip("this CPU has no bfloat16")
    model, inputs = case_model("cond").train(), case_inputs("cond")
    arguments = inputs["x"], inputs["sigma"].log() / 4
    labels = {"class_labels": inputs["labels"]}
    for block in model.modules():
        if isinstance(block, Block):
            block.dropout = 0.0
    rounded = execution.HalfPrecision(model, torch.bfloat16)(*arguments, **labels)
    rounded.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    exact = model(*arguments, **labels)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.05


@pytest.mark.slow
def test_training_is_one_graph_for_the_compiler():
    """The graph includes the normalisation of stored weights; one level compiles in less time."""
    options = {"image_size": 4, "ch_mult": (1,)}
    model, twin = randomised(**options).train(), randomised(**options).train()
    inputs = torch.randn(2, 1, 4, 4), torch.tensor([0.1, 0.5])
    graph = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    expected, results = with_gradient(twin, twin, *inputs), with_gradient(model, graph, *inputs)
    for compiled, eager in zip(results, expected, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    for compiled, eager in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
def test_the_network_is_one_graph_for_export():
    model, inputs = randomised().eval(), (torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.5]))
    exported = torch.export.export(model, inputs).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
