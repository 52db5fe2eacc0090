"""The networks against the published ones: outputs, names, counts; every option; every error."""

import importlib
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
from configs.published import UNREAD
from models import layers
from models.ncsn import InstanceNormPlus
from models.ncsnpp import NCSNpp
from models.weights import load_model
from tests.reference_weights import expand, weight

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = json.loads((GOLDEN / "networks.json").read_text())
STATE_DICTS = json.loads((GOLDEN / "state_dicts.json").read_text())
CASES = sorted(NETWORKS["cases"])

pytestmark = pytest.mark.usefixtures("one_thread")


def load_config(path):
    name = path.removesuffix(".py").replace("/", ".")
    return importlib.import_module(f"configs.{name.removeprefix('configs.')}").get_config()


def case_config(case):
    """The config of a golden network: a published file and what the case changes in it."""
    case = NETWORKS["cases"][case]
    if "config" not in case:
        config = load_config("ve/ncsnv2/cifar10.py")
        for section in ("data", "model"):
            values = {k: v for k, v in case[section].items() if k in config[section]}
            config[section].update(values)
        config.model.scale_by_sigma = case["model"]["name"] != "ncsn"
        return config
    config = load_config(case["config"])
    overrides = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in case["overrides"].items()
        if k not in UNREAD
    }
    config.update_from_flattened_dict(overrides)
    return config


def case_weights(case):
    shapes = expand(NETWORKS, NETWORKS["cases"][case]["state"])
    return {name: weight(name, shape) for name, shape in shapes.items()}


def case_model(case):
    model = models.create_model(case_config(case)).eval()
    models.load_reference_state_dict(model, case_weights(case))
    return model


def digits_config(**changes):
    """The smallest experiment, its network smaller still; `changes` are of `config.model`."""
    config = load_config("poisson/digits_ddpmpp.py")
    config.model.update(nf=8, **changes)
    return config


def outputs(model, x, label):
    out = model(x, label)
    return out if isinstance(out, tuple) else (out,)


# Parity with the published networks.


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_published_ones(case):
    with np.load(GOLDEN / "networks.npz") as file:
        arrays = {k.removeprefix(f"{case}/"): file[k] for k in file if k.startswith(f"{case}/")}
    if "x_seed" in arrays:
        data = NETWORKS["cases"][case]["data"]
        shape = (2, data["num_channels"], data["image_size"], data["image_size"])
        arrays["x"] = np.random.RandomState(arrays["x_seed"]).uniform(size=shape)
    x, label = torch.from_numpy(arrays["x"]).float(), torch.from_numpy(arrays["cond"])
    expected = [arrays[name] for name in sorted(arrays) if name.startswith("out")]
    assert len(expected) == (2 if case.startswith("poisson") else 1)

    model = case_model(case)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            got = outputs(model, x.contiguous(memory_format=layout), label)
        for actual, published in zip(got, expected, strict=True):
            assert actual.dtype == torch.float32
            if x.shape[-1] > 64:
                actual = actual[:, :, ::8, ::8]
            scale = np.abs(published).max()
            np.testing.assert_allclose(actual.numpy(), published, rtol=1e-4, atol=1e-5 * scale)


def test_every_network_has_a_published_case():
    # test_edm_networks.py, test_edm2.py, test_dit.py, test_toys.py
    others = {"edm_unet", "adm", "edm2", "dit", "mlp"}
    assert {case_config(case).model.name for case in CASES} | others == set(models.NETWORKS)


@pytest.mark.parametrize("path", sorted(STATE_DICTS["config_to_model"]))
def test_published_names_shapes_order_and_counts(path):
    published = STATE_DICTS["models"][STATE_DICTS["config_to_model"][path]]
    with torch.device("meta"):
        model = models.create_model(load_config(path))
    parameters = dict(model.named_parameters())
    names = models.reference_names(model)
    shapes = {name: tuple(parameters[key].shape) for name, key in names.items()}
    assert list(shapes.items()) == list(expand(STATE_DICTS, published["state"]).items())
    assert list(names.values()) == list(parameters)
    trainable = [p.numel() for p in parameters.values() if p.requires_grad]
    assert sum(p.numel() for p in parameters.values()) == published["parameters"]
    assert sum(trainable) == published["trainable"]


@pytest.mark.parametrize("model_id", sorted(STATE_DICTS["models"]))
def test_weights_survive_a_round_trip(model_id):
    paths = STATE_DICTS["config_to_model"]
    path = next(path for path in paths if paths[path] == model_id)
    with torch.device("meta"):
        model = models.create_model(load_config(path))
    # In half precision, in which integers up to 2048 are exact: entry k is filled with k.
    model = model.half().to_empty(device="cpu")
    shapes = expand(STATE_DICTS, STATE_DICTS["models"][model_id]["state"])
    assert 300 < len(shapes) < 2048
    filled = {
        name: torch.tensor(float(k)).expand(shape) for k, (name, shape) in enumerate(shapes.items())
    }
    models.load_reference_state_dict(model, filled)
    parameters, names = dict(model.named_parameters()), models.reference_names(model)
    for k, name in enumerate(shapes):
        flat = parameters[names[name]].view(-1)
        assert flat[0] == flat[-1] == k, name


@pytest.mark.parametrize("case", CASES)
def test_names_of_small_networks(case):
    model = models.create_model(case_config(case))
    parameters, names = dict(model.named_parameters()), models.reference_names(model)
    shapes = expand(NETWORKS, NETWORKS["cases"][case]["state"])
    assert list(names) == list(shapes)
    assert {name: tuple(parameters[key].shape) for name, key in names.items()} == shapes


def test_module_prefix_and_sigmas_are_accepted():
    weights = case_weights("ncsnv2_64")
    model = models.create_model(case_config("ncsnv2_64"))
    prefixed = {f"module.{name}": value for name, value in weights.items()}
    models.load_reference_state_dict(model, prefixed | {"module.sigmas": torch.zeros(12)})
    torch.testing.assert_close(model.begin_conv.weight.data, weights["begin_conv.weight"])
    assert not [name for name in model.state_dict() if "sigmas" in name]


WRAPPERS = ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module."]
WRAPPERS += ["model._orig_mod.module.", "module.module.", "_orig_mod.model.module._orig_mod."]


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_names_of_wrappers_are_accepted_in_any_order(prefix):
    weights = case_weights("ncsnv2_64")
    model = models.create_model(case_config("ncsnv2_64"))
    prefixed = {f"{prefix}{name}": value for name, value in weights.items()}
    models.load_reference_state_dict(model, prefixed | {f"{prefix}sigmas": torch.zeros(12)})
    names = models.reference_names(model)
    assert all(torch.equal(model.get_parameter(names[n]), weights[n]) for n in names)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("compiled", ["", "features", "encoder.0"])
def test_weights_of_compiled_and_parallel_networks_are_loaded(published, compiled):
    """State dicts as PyTorch writes them: of a wrapped network, and of one with a compiled part."""
    model, other = (models.create_model(case_config("poisson_ddpmpp")) for _ in range(2))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    if compiled:
        parent, _, name = compiled.rpartition(".")
        setattr(model.get_submodule(parent), name, torch.compile(model.get_submodule(compiled)))
    weights = torch.nn.DataParallel(torch.compile(model)).state_dict()
    assert all(name.startswith("module._orig_mod.") for name in weights)
    if published and not compiled:
        names = models.reference_names(other)
        weights = {f"module._orig_mod.{name}": expected[key] for name, key in names.items()}
    load_model(other, dict(weights))
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_a_weight_that_is_there_twice_is_refused():
    weights = case_weights("ncsnv2_64")
    model = models.create_model(case_config("ncsnv2_64"))
    with pytest.raises(ValueError, match=r"'begin_conv\.weight' twice, once as 'module\.begin_"):
        models.load_reference_state_dict(
            model, weights | {"module.begin_conv.weight": weights["begin_conv.weight"]}
        )


def test_trainable_parameters_have_the_published_order():
    """Order alone pairs a published moving average, a list without names, with parameters."""
    model = models.create_model(case_config("poisson_ncsnpp_fir_residual_input"))
    published = {key: name for name, key in models.reference_names(model).items()}
    trained = [published[name] for name, p in model.named_parameters() if p.requires_grad]
    entries = list(case_weights("poisson_ncsnpp_fir_residual_input"))
    assert trained == [name for name in entries if name != "all_modules.0.W"]


# Every option.

RESAMPLERS = [("biggan", True), ("ddpm", True), ("ddpm", False)]  # biggan reads no resamp_with_conv
FILTERS = [None, (1, 3, 3, 1)]
OUTPUTS = ["none", "output_skip", "residual"]
INPUTS = [("none", "sum"), ("input_skip", "sum"), ("input_skip", "cat"), ("residual", "sum")]


@pytest.mark.parametrize("resampler", RESAMPLERS, ids=lambda v: f"{v[0]}-{v[1]}")
@pytest.mark.parametrize("fir_kernel", FILTERS, ids=["nearest", "fir"])
@pytest.mark.parametrize("progressive", OUTPUTS)
@pytest.mark.parametrize("inputs", INPUTS, ids="-".join)
def test_every_combination_of_options(resampler, fir_kernel, progressive, inputs):
    resblock_type, resamp_with_conv = resampler
    progressive_input, progressive_combine = inputs
    # Options of the ends of the network, or of every block alike, are cycled, not crossed.
    nonlinearities = itertools.cycle(["elu", "lrelu", "relu", "swish", "swish"])
    images = itertools.cycle([(1, (4, 4), True), (3, (8, 4), False), (2, (4, 8), True)])
    torch.manual_seed(0)
    for embedding_type, conditional, scale_by_sigma, skip_rescale in itertools.product(
        ("fourier", "positional"), *[(True, False)] * 3
    ):
        channels, size, field = next(images)
        model = NCSNpp(
            image_size=4,
            channels=channels,
            out_channels=channels + field,
            nf=4,
            ch_mult=(1, 2),
            num_res_blocks=1,
            attn_resolutions=(4,),
            embedding_type=embedding_type,
            conditional=conditional,
            resblock_type=resblock_type,
            resamp_with_conv=resamp_with_conv,
            fir_kernel=fir_kernel,
            progressive=progressive,
            progressive_input=progressive_input,
            progressive_combine=progressive_combine,
            nonlinearity=next(nonlinearities),
            dropout=0.1,
            init_scale=1.0,
            skip_rescale=skip_rescale,
            scale_by_sigma=scale_by_sigma,
            sigmas=layers.geometric_sigmas(50.0, 0.01, 10),
        )
        x, label = torch.rand(1, channels, *size), torch.full((1,), 3.0)
        out = outputs(model, x, label)
        assert [o.shape for o in out] == [(1, channels + field, *size)]
        sum(o.square().sum() for o in out).backward()
        for name, parameter in model.named_parameters():
            if conditional or not name.endswith(("dense.weight", "dense.bias")):
                used = parameter.requires_grad
                assert (parameter.grad is not None) == used, name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256"])
@pytest.mark.parametrize("nonlinearity", ["elu", "lrelu", "relu", "swish"])
@pytest.mark.parametrize("channels", [1, 3])
def test_refinenets_train(name, nonlinearity, channels):
    config = case_config(name)
    config.model.update(nf=4, nonlinearity=nonlinearity)
    config.data.update(image_size=16, num_channels=channels)
    model = models.create_model(config)
    x = torch.rand(2, channels, 16, 16)
    out = model(x, torch.tensor([0, 9]))
    assert out.shape == x.shape
    out.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("conditional", [True, False])
def test_ddpm_with_and_without_condition(conditional):
    config = load_config("vp/ddpm/cifar10_unconditional.py")
    config.model.update(conditional=conditional, nf=8, ch_mult=(1, 2), attn_resolutions=(4,))
    config.data.image_size = 8
    model = models.create_model(config).eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = {
        name: weight(name, shapes[key]) for name, key in models.reference_names(model).items()
    }
    models.load_reference_state_dict(model, weights)
    x = torch.rand(1, 3, 8, 8).expand(2, -1, -1, -1)
    one, other = model(x, torch.tensor([1, 700]))
    assert torch.allclose(one, other) != conditional


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp"])
def test_field_output_in_both_unets(name):
    config = digits_config(name=name)
    field_x, field_z = models.create_model(config)(torch.rand(3, 1, 8, 8), torch.rand(3))
    assert field_x.shape == (3, 1, 8, 8)
    assert field_z.shape == (3,)


def test_sizes_that_the_levels_divide():
    config = digits_config()
    config.data.image_size = 28
    config.model.ch_mult = (1, 1, 2)
    model = models.create_model(config)
    for height, width in ((28, 28), (4, 4), (12, 20)):
        assert model(torch.rand(1, 1, height, width), torch.ones(1))[0].shape[2:] == (height, width)


def test_dropout_only_when_training():
    model = models.create_model(digits_config(dropout=0.5, init_scale=1.0))
    x, z = torch.rand(2, 1, 8, 8), torch.rand(2)
    assert not torch.equal(model(x, z)[0], model(x, z)[0])
    model.eval()
    assert torch.equal(model(x, z)[0], model(x, z)[0])


@pytest.mark.parametrize("resblock_type", ["biggan", "ddpm"])
def test_checkpointed_activations_change_memory_and_nothing_else(resblock_type):
    """Gradients are equal, with dropout too; backward keeps less than half."""
    x, label = torch.randn(2, 1, 8, 8), torch.rand(2) + 0.5
    results = {}
    for checkpointed in (False, True):
        torch.manual_seed(0)
        options = {"resblock_type": resblock_type, "checkpoint_activations": checkpointed}
        model = models.create_model(digits_config(dropout=0.5, init_scale=1.0, **options))
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            field_x, field_z = model.train()(x, label)
        weights = {p.data_ptr() for p in model.parameters()}
        memory = sum(size for address, size in sizes.items() if address not in weights)
        (field_x.square().sum() + field_z.sum()).backward()
        results[checkpointed] = memory, [p.grad for p in model.parameters()]
    (memory, gradients), (less_memory, same_gradients) = results[False], results[True]
    torch.testing.assert_close(same_gradients, gradients, rtol=0, atol=0)
    assert less_memory < memory / 2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("case", ["poisson_ncsnpp_fir_residual_input", "vp_ddpm", "ncsnv2_64"])
def test_dtype_is_that_of_the_input(case, dtype, tolerance):
    model = case_model(case)
    config = case_config(case)
    torch.manual_seed(0)
    x = torch.rand(2, 3, config.data.image_size, config.data.image_size)
    label = torch.tensor([1.0, 7.0])
    with torch.no_grad():
        expected = outputs(model, x, label)
        got = outputs(model.to(dtype), x.to(dtype), label)
    for actual, reference in zip(got, expected, strict=True):
        assert actual.dtype == dtype
        assert (actual - reference).norm() < tolerance * reference.norm()


def test_fresh_network_starts_near_zero_output():
    # init_scale = 0: the last convolution, and with it the field, is almost zero at first.
    out = outputs(models.create_model(digits_config()), torch.rand(2, 1, 8, 8), torch.rand(2))
    assert 0 < out[0].abs().max() < 1e-3


def test_init_variance():
    torch.manual_seed(0)
    layer = layers.conv(64, 128, init_scale=0.25)
    variance = 0.25 / ((64 * 9 + 128 * 9) / 2)
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.02)
    assert layer.bias.abs().max() == 0


# The layers against their definitions.


@pytest.mark.parametrize("skip_rescale", [True, False])
def test_attention_is_softmax_of_scaled_products(skip_rescale):
    torch.manual_seed(0)
    block = layers.Attention(8, init_scale=1.0, skip_rescale=skip_rescale).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 8, 4, 6, dtype=torch.float64)
    h = F.group_norm(x, 2, block.norm.weight, block.norm.bias, eps=1e-6)
    q, k, v = (
        torch.einsum("bchw,cd->bdhw", h, m.W) + m.b[:, None, None]
        for m in (block.query, block.key, block.value)
    )
    scores = torch.einsum("bchw,bcij->bhwij", q, k) / math.sqrt(8)
    weights = scores.flatten(3).softmax(dim=3).view_as(scores)
    h = torch.einsum("bhwij,bcij->bchw", weights, v)
    h = torch.einsum("bchw,cd->bdhw", h, block.out.W) + block.out.b[:, None, None]
    expected = (x + h) / (math.sqrt(2) if skip_rescale else 1)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_positional_features():
    label = torch.tensor([0.01, 3.0, 702.5])
    expected = np.zeros((3, 9))  # an odd size has a zero at the end
    for row, t in enumerate(label.tolist()):
        for i in range(4):
            angle = t * 10000 ** (-i / 3)
            expected[row, i], expected[row, i + 4] = math.sin(angle), math.cos(angle)
    got = layers.PositionalFeatures(9)(label)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)
    assert torch.equal(
        layers.PositionalFeatures(9)(torch.tensor([3])),
        layers.PositionalFeatures(9)(torch.tensor([3.0])),
    )


def test_fourier_features():
    features = layers.FourierFeatures(2, scale=1.0)
    features.W.data = torch.tensor([0.5, -2.0])
    angles = [2 * math.pi * w * math.log(7.3) for w in (0.5, -2.0)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    got = features(torch.tensor([7.3]))
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1e-5)
    assert layers.FourierFeatures(4096, scale=16.0).W.std().item() == pytest.approx(16, rel=0.05)


def slow_filter(image, kernel):
    """Every full product of `kernel` with zero-padded `image`; out[0] is its first overlap."""
    kh, kw = kernel.shape
    padded = np.pad(image, ((kh - 1, kh - 1), (kw - 1, kw - 1)))
    out = np.zeros((padded.shape[0] - kh + 1, padded.shape[1] - kw + 1))
    for i, j in np.ndindex(*out.shape):
        out[i, j] = (padded[i : i + kh, j : j + kw] * kernel).sum()
    return out


@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 2), (1, 2, 3, 4, 2, 1)])
def test_upsampling_with_filter_and_convolution(taps):
    # Zeros between the pixels, then convolution and filter over the whole plane, no border between.
    torch.manual_seed(0)
    layer = layers.Resampling(2, 3, up=True, fir_kernel=taps).double()
    torch.nn.init.normal_(layer.fir_conv.bias)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    fir = np.outer(taps, taps) * 4 / sum(taps) ** 2
    w, b = layer.fir_conv.weight.detach().numpy(), layer.fir_conv.bias.detach().numpy()
    expected = np.zeros((3, 6, 8))
    for out, inp in np.ndindex(3, 2):
        spread = np.zeros((6, 8))
        spread[::2, ::2] = x[0, inp].numpy()
        # A filter is flipped as in a convolution, the weights of a network are not.
        full = slow_filter(slow_filter(spread, w[out, inp]), fir[::-1, ::-1])
        # A pixel lies at the middle of its two: half a pixel before it where the filter is even.
        start = 1 + (len(taps) - 1) // 2
        expected[out] += full[start : start + 6, start : start + 8]
    np.testing.assert_allclose(
        layer(x)[0].detach().numpy(), expected + b[:, None, None], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("conditional", [True, False])
def test_instance_norm_plus(conditional):
    torch.manual_seed(0)
    norm = InstanceNormPlus(4, num_classes=5 if conditional else None).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x, labels = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.tensor([4, 1])
    for b in range(2):
        if conditional:
            gamma, alpha, beta = norm.embed.weight[labels[b]].detach().numpy().reshape(3, 4)
        else:
            gamma, alpha, beta = (p.detach().numpy() for p in (norm.gamma, norm.alpha, norm.beta))
        image = x[b].numpy()
        mu = image.mean(axis=(1, 2))
        spread = (mu - mu.mean()) / np.sqrt(mu.var(ddof=1) + 1e-5)
        for c in range(4):
            plain = (image[c] - mu[c]) / np.sqrt(image[c].var() + 1e-5)
            expected = gamma[c] * (plain + alpha[c] * spread[c]) + beta[c]
            got = norm(x, labels)[b, c].detach().numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


def test_sigmas_descend_evenly_in_the_log():
    sigmas = layers.geometric_sigmas(50.0, 0.01, 5)
    np.testing.assert_allclose(sigmas.numpy(), [50 * 5000 ** (-i / 4) for i in range(5)])


def test_group_norm_divides_any_width():
    for channels, groups in ((3, 1), (32, 8), (128, 32), (144, 24), (512, 32)):
        assert layers.group_norm(channels).num_groups == groups
    assert layers.group_norm(48, group_width=1).num_groups == 24


# Errors: one line, which says what is wrong, where, and what to do.


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "option",
    [
        "name",
        "nonlinearity",
        "embedding_type",
        "resblock_type",
        "progressive",
        "progressive_input",
        "progressive_combine",
    ],
)
def test_unknown_value_lists_the_known(option):
    default = getattr(digits_config().model, option)
    with pytest.raises(ValueError) as error:
        models.create_model(digits_config(**{option: "sideways"}))
    text = message(error)
    assert f"model.{option} must be one of " in text
    assert repr(default) in text.partition(", not 'sideways'")[0]


def test_unknown_name_lists_all_networks():
    with pytest.raises(ValueError) as error:
        models.create_model(digits_config(name="unet"))
    listed = re.findall(r"'(\w+)'", message(error).partition(", not 'unet'")[0])
    published = ["ddpm", "ncsn", "ncsnpp", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256"]
    assert sorted(listed) == sorted([*published, "edm_unet", "adm", "edm2", "dit", "mlp"])


@pytest.mark.parametrize("taps", [(1.0, -1.0), (0,), (1e-30, 1e-30), (0.1, 0.2, -0.3)])
def test_a_filter_without_a_sum_is_refused(taps):
    with pytest.raises(ValueError, match=r"the taps of model\.fir_kernel=.* must not sum to 0"):
        models.create_model(digits_config(fir=True, fir_kernel=taps))


def test_unknown_nonlinearity_of_a_refinenet():
    config = case_config("ncsn")
    config.model.nonlinearity = "sideways"
    with pytest.raises(ValueError, match="model.nonlinearity must be .*, not 'sideways'"):
        models.create_model(config)


def test_options_that_do_not_go_together():
    config = case_config("ncsn")
    config.training.sde = "poisson"
    with pytest.raises(ValueError, match="'ncsn' gives the channels of the image and no more"):
        models.create_model(config)
    config = digits_config(embedding_type="fourier")
    config.training.continuous = False
    with pytest.raises(ValueError, match="model.embedding_type = 'fourier'"):
        models.create_model(config)


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda w: without(w, "all_modules.6.NIN_2.W"), "lack 'all_modules.6.NIN_2.W';"),
        (lambda w: w | {"all_modules.99.W": torch.ones(1)}, "unknown 'all_modules.99.W';"),
        (
            lambda w: w | {"all_modules.6.NIN_2.W": torch.ones(64, 63)},
            "'all_modules.6.NIN_2.W' has the shape (64, 63), not (64, 64)",
        ),
        (lambda w: w | {"all_modules.6.NIN_2.W": 3}, "NIN_2.W' is no dense tensor"),
        (
            lambda w: w | {"all_modules.6.NIN_2.W": torch.ones(64, 64).to(torch.complex64)},
            "NIN_2.W' is of torch.complex64, not real",
        ),
        (
            lambda w: w | {"all_modules.6.NIN_2.W": 1e300 * torch.ones(64, 64).double()},
            "NIN_2.W' is not finite",
        ),
        (lambda w: {}, "lack 'all_modules.0.weight' and 153 more;"),
    ],
    ids=["missing", "unknown", "shape", "number", "complex", "too large", "empty"],
)
def test_wrong_weights_are_named_and_nothing_is_loaded(change, expected):
    model = models.create_model(case_config("poisson_ddpmpp"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        models.load_reference_state_dict(model, change(case_weights("poisson_ddpmpp")))
    assert expected in message(error)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
