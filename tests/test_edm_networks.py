"""The networks of EDM against the published ones: outputs, names, counts; labels; errors."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import models
from configs import parts
from models import layers
from tests.reference_weights import case_arrays, expand, weight

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = json.loads((GOLDEN / "edm_networks.json").read_text())
CASES, FULL_SIZE = PUBLISHED["cases"], PUBLISHED["full_size"]
SIGMA_DATA = 0.5

pytestmark = pytest.mark.usefixtures("one_thread")


def published_config(options):
    """The config of EDM's `options`; those left out are its defaults, as in configs/parts.py."""
    if options["model_type"] == "DhariwalUNet":
        part = parts.ADM
    elif options["encoder_type"] == "residual":
        part = parts.EDM_NCSNPP
    else:
        part = parts.EDM_DDPMPP
    config = parts.experiment(part)
    # any method whose network has as many output channels as the image
    config.training.sde = "vpsde"
    config.data.update(
        image_size=options["img_resolution"],
        num_channels=options["img_channels"],
        num_classes=options["label_dim"],
    )
    config.model.update(
        nf=options["model_channels"],
        ch_mult=tuple(options["channel_mult"]),
        num_res_blocks=options.get("num_blocks", config.model.num_res_blocks),
        attn_resolutions=tuple(options.get("attn_resolutions", config.model.attn_resolutions)),
        augment_dim=options.get("augment_dim", 0),
    )
    return config


def case_shapes(case):
    return expand(PUBLISHED, CASES[case]["state"])


def case_weights(case):
    return {name: weight(name, shape) for name, shape in case_shapes(case).items()}


def case_model(case, **changes):
    config = published_config(CASES[case]["options"])
    config.model.update(changes)
    model = models.create_model(config).eval()
    models.load_reference_state_dict(model, case_weights(case))
    return model


def case_inputs(case):
    return {"augment_labels": None, **case_arrays("edm_networks.npz", case)}


def denoised(model, inputs, class_labels):
    """EDM's preconditioning, Table 1 of arXiv 2206.00364."""
    x, sigma = inputs["x"], inputs["sigma"][:, None, None, None]
    norm = (sigma**2 + SIGMA_DATA**2).sqrt()
    out = model(x / norm, inputs["sigma"].log() / 4, class_labels, inputs["augment_labels"])
    return (SIGMA_DATA / norm) ** 2 * x + sigma * SIGMA_DATA / norm * out


def close(actual, published):
    scale = published.abs().max().item()
    torch.testing.assert_close(actual, published, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_published_ones(case):
    model, inputs = case_model(case), case_inputs(case)
    labels = inputs["labels"]
    with torch.no_grad():
        raw = model(inputs["x"], inputs["sigma"].log() / 4, labels, inputs["augment_labels"])
        close(raw, inputs["raw"])
        close(denoised(model, inputs, labels), inputs["denoised"])
        if labels is not None:
            for none in (None, torch.full_like(labels, -1)):
                close(denoised(model, inputs, none), inputs["denoised_nolabel"])


@pytest.mark.parametrize("case", FULL_SIZE)
def test_full_size_names_shapes_and_counts(case):
    published = FULL_SIZE[case]
    with torch.device("meta"):
        model = models.create_model(published_config(published["options"]))
    parameters, names = dict(model.named_parameters()), models.reference_names(model)
    shapes = {
        name.removeprefix("model."): shape
        for name, shape in expand(PUBLISHED, published["state"]).items()
    }
    assert {name: tuple(parameters[key].shape) for name, key in names.items()} == shapes
    assert list(names.values()) == list(parameters)
    if "adm" not in case:
        assert list(names) == list(shapes)
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert trainable == published["parameters"]


def test_names_of_skipped_images():
    """EDM's `encoder_type='skip'` and `decoder_type='skip'`, of which no weights are published."""
    config = published_config(CASES["ddpmpp"]["options"])
    config.model.update(progressive_input="input_skip", progressive="output_skip")
    names = list(models.reference_names(models.create_model(config)))
    assert names.index("enc.4x4_down.skip.bias") + 1 == names.index("enc.4x4_aux_skip.weight")
    aux = [name for name in names if "aux" in name and name.endswith("weight")]
    assert aux == [
        "enc.4x4_aux_skip.weight",
        "dec.4x4_aux_norm.weight",
        "dec.4x4_aux_conv.weight",
        "dec.8x8_aux_norm.weight",
        "dec.8x8_aux_conv.weight",
    ]


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_prefixes_and_filters_are_accepted(prefix):
    weights = case_weights("ncsnpp")
    state_dict = {name.replace("model.", prefix, 1): value for name, value in weights.items()}
    state_dict[f"{prefix}enc.8x8_down.conv0.resample_filter"] = torch.zeros(1, 1, 4, 4)
    model = models.create_model(published_config(CASES["ncsnpp"]["options"]))
    models.load_reference_state_dict(model, state_dict)
    assert torch.equal(model.features.W, weights["model.map_noise.freqs"])


# Labels.


@pytest.mark.parametrize("case", ["ncsnpp_cond_augment", "adm_cond"])
def test_every_row_has_its_own_labels(case):
    model, inputs = case_model(case), case_inputs(case)
    x, label = inputs["x"], inputs["sigma"].log() / 4
    class_labels = torch.tensor([3, -1, 9])
    augment_labels = inputs["augment_labels"]
    with torch.no_grad():
        together = model(x, label, class_labels, augment_labels)
        for i in range(3):
            row = slice(i, i + 1)
            augment = None if augment_labels is None else augment_labels[row]
            alone = model(x[row], label[row], None if i == 1 else class_labels[row], augment)
            torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)
        changed = model(x, label, torch.tensor([3, 4, 9]), augment_labels)
        assert torch.allclose(changed[[0, 2]], together[[0, 2]], atol=1e-5)
        assert not torch.allclose(changed[1], together[1], atol=1e-3)


def test_augmentation_labels_of_zero_are_none():
    model, inputs = case_model("ncsnpp_cond_augment"), case_inputs("ncsnpp_cond_augment")
    x, label = inputs["x"], inputs["sigma"].log() / 4
    with torch.no_grad():
        none = model(x, label, inputs["labels"])
        zero = model(x, label, inputs["labels"], torch.zeros(3, 9))
        nonzero = model(x, label, inputs["labels"], inputs["augment_labels"])
    assert torch.equal(none, zero)
    assert not torch.allclose(none, nonzero, atol=1e-3)


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm"])
def test_other_unets_take_labels_too(name):
    config = published_config(CASES["ddpmpp_cond"]["options"])
    config.model.name = name
    config.training.sde = "poisson"
    model = models.create_model(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():  # the last layers of branches are almost zero at first
        torch.nn.init.normal_(parameter, std=0.1)
    x, z = torch.rand(1, 3, 8, 8).expand(3, -1, -1, -1), torch.ones(3)
    field_x, field_z = model(x, z, class_labels=torch.tensor([0, 0, 1]))
    assert torch.equal(field_x[0], field_x[1])
    assert not torch.equal(field_x[0], field_x[2])
    assert field_z.shape == (3,)


def test_labels_beyond_the_classes_are_an_error():
    model = case_model("adm_cond")
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.tensor([10]))


# Training.


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_trained(case):
    """Recomputed activations change no gradient; without labels too each weight has one."""
    inputs, gradients = case_inputs(case), []
    for checkpointed in (False, True):
        model = case_model(case, checkpoint_activations=checkpointed)
        x, label = inputs["x"], inputs["sigma"].log() / 4
        model(x, label, inputs["labels"], inputs["augment_labels"]).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    model.zero_grad()
    model(x, label).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_initial_weights_of_adm():
    """PyTorch's: uniform of variance 1 / (3 fan_in); 0 where a branch ends, N(0, 1) for labels."""
    torch.manual_seed(0)
    options = {**CASES["adm_cond"]["options"], "model_channels": 64, "augment_dim": 9}
    model = models.create_model(published_config(options))
    parameters = dict(model.named_parameters())
    fresh = {name: parameters[key] for name, key in models.reference_names(model).items()}
    for name, parameter in fresh.items():
        zero = name.startswith(("out_conv", "map_augment")) or ".conv1." in name or ".proj." in name
        if zero:
            assert not parameter.any(), name
        elif parameter.ndim > 1 and parameter.numel() > 2000:
            fan_in = math.prod(parameter.shape[1:])
            variance = 1 if name == "map_label.weight" else 1 / (3 * fan_in)
            assert parameter.var().item() == pytest.approx(variance, rel=0.15), name
    x = torch.randn(2, 3, 16, 16)
    assert not model(x, torch.zeros(2), torch.tensor([1, -1]), torch.ones(2, 9)).any()


@pytest.mark.parametrize("case", ["ncsnpp_cond_augment", "adm_cond"])
def test_the_compiler_sees_one_graph(case, monkeypatch):
    monkeypatch.setenv("PFGM_FUSED_OPS", "0")  # looking for CUDA kernels may warn
    model, inputs = case_model(case), case_inputs(case)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    label = inputs["sigma"].log() / 4
    with torch.no_grad():
        got = compiled(inputs["x"], label, inputs["labels"], inputs["augment_labels"])
    close(got, inputs["raw"])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("case", ["ncsnpp_cond_augment", "adm_cond"])
def test_dtype_is_that_of_the_input(case, dtype, tolerance):
    model, inputs = case_model(case).to(dtype), case_inputs(case)
    conditions = (inputs["sigma"].log() / 4, inputs["labels"], inputs["augment_labels"])
    with torch.no_grad():
        got = model(inputs["x"].to(dtype), *conditions)
    assert got.dtype == dtype
    assert (got - inputs["raw"]).norm() < tolerance * inputs["raw"].norm()


# The layers against their definitions.


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_of_several_heads(heads):
    """A head's softmax of scaled products; its channels number queries, keys, values in turn."""
    torch.manual_seed(0)
    width = 4
    options = {"init_scale": 1.0, "skip_rescale": True, "head_width": width}
    block = layers.MultiHeadAttention(heads * width, **options).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, heads * width, 3, 5, dtype=torch.float64)
    groups = heads * width // 4
    h = F.group_norm(x, groups, block.norm.weight, block.norm.bias, eps=1e-6)
    qkv = torch.einsum("bchw,dc->bdhw", h, block.qkv.weight[:, :, 0, 0])
    qkv = (qkv + block.qkv.bias[:, None, None]).flatten(2)
    attended = torch.empty_like(x).flatten(2)
    for head in range(heads):
        rows = range(3 * width * head, 3 * width * (head + 1), 3)
        q, k, v = (qkv[:, [row + part for row in rows]] for part in range(3))
        weights = (torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(width)).softmax(dim=2)
        attended[:, width * head : width * (head + 1)] = torch.einsum("bqk,bck->bcq", weights, v)
    h = torch.einsum("bcp,dc->bdp", attended, block.proj.weight[:, :, 0, 0]).view_as(x)
    expected = (x + h + block.proj.bias[:, None, None]) / math.sqrt(2)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


# Errors: one line, which says what is wrong, where, and what to do.


@pytest.mark.parametrize("case", ["ddpmpp", "adm"])
@pytest.mark.parametrize(
    "conditions, key",
    [
        ({"class_labels": torch.tensor([1])}, "data.num_classes"),
        ({"augment_labels": torch.zeros(1, 9)}, "model.augment_dim"),
    ],
)
def test_labels_of_a_network_without(case, conditions, key):
    options = CASES[case]["options"]
    model, size = case_model(case), options["img_resolution"]
    x = torch.zeros(1, options["img_channels"], size, size)
    with pytest.raises(ValueError, match=f"takes no {next(iter(conditions))}: .*{key}"):
        model(x, torch.zeros(1), **conditions)


def test_networks_that_cannot_have_labels():
    config = published_config(CASES["ddpmpp_cond"]["options"])
    config.model.augment_dim = -1
    with pytest.raises(ValueError, match="model.augment_dim must not be negative"):
        models.create_model(config)
    config.model.augment_dim = 0
    config.model.conditional = False
    with pytest.raises(ValueError, match="data.num_classes .* model.conditional = True"):
        models.create_model(config)
    config.training.continuous = False
    config.model.name = "ncsn"
    with pytest.raises(ValueError, match="'ncsn' takes no class or augmentation labels"):
        models.create_model(config)
    config.data.num_classes = 0
    refinenet = models.create_model(config)
    with pytest.raises(ValueError, match="takes no class_labels"):
        refinenet(torch.zeros(1, 3, 8, 8), torch.zeros(1), class_labels=torch.zeros(1).long())


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda w: w.pop("model.enc.8x8_block0.qkv.bias"), "lack 'enc.8x8_block0.qkv.bias';"),
        (lambda w: w.update({"model.map_tag": torch.ones(1)}), "unknown 'map_tag';"),
        (
            lambda w: w.update({"model.out_conv.bias": torch.ones(4)}),
            "'out_conv.bias' has the shape (4,), not (3,)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_wrong_weights_are_named_and_nothing_is_loaded(change, expected):
    model, weights = models.create_model(published_config(CASES["adm"]["options"])), None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = case_weights("adm")
    change(weights)
    with pytest.raises(ValueError) as error:
        models.load_reference_state_dict(model, weights)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_options_that_edm_has_not():
    config = published_config(CASES["ncsnpp"]["options"])
    config.model.fir = False  # so the image is halved by a strided convolution
    model = models.create_model(config)
    with pytest.raises(ValueError, match="EDM has no network with 'encoder.0.progressive_input"):
        models.load_reference_state_dict(model, case_weights("ncsnpp"))
