"""Images whose sides differ: sizes in a config, networks, cutting, restoration, pictures."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_files import encoded, pictures
from hypothesis import given
from hypothesis import strategies as st
from test_configs import load
from warm_start import run_main

import datasets
import models
from completion import complete
from library.restoration import known_pixels, measured_shape
from models import layers
from models.halvings import Halvings
from models.ncsn import RefineNet
from models.unet import UNet
from reports.images import image_grid
from sources import images
from sources.augmentation import transform
from sources.codec import EightBitImages
from sources.images import cropped_then_resized, image_size_of, largest_part, resize, sides_of
from sources.preparation import Preparation
from sources.sizes import changes

pytestmark = pytest.mark.usefixtures("one_thread")

# --- sizes in a config ----------------------------------------------------------------------------


def digits_of(size, path="edm/digits_ddpmpp.py", **model):
    config = load(path)
    config.data.image_size = size
    config.model.update({"nf": 8, **model})
    return config


def test_one_number_is_a_square():
    assert sides_of(8) == (8, 8) and sides_of([6, 10]) == (6, 10)
    assert image_size_of((8, 8)) == 8 and image_size_of([6, 10]) == (6, 10)


@pytest.mark.parametrize("text", ["6,10", "(6, 10)", "[6,10]"])
def test_sides_on_the_command_line(tmp_path, text):
    np.save(tmp_path / "x.npy", pictures(10, 6, 10, 1))
    done = run_main(
        [
            *("--config", "configs/pfgmpp/images16_ddpmpp.py", "--mode", "train", "--dry_run"),
            *("--workdir", tmp_path / "run", f"--config.data.path={tmp_path / 'x.npy'}"),
            *(f"--config.data.image_size={text}", "--config.model.nf=4"),
        ]
    )
    assert "6 x 10, 1 channel" in done.stdout + done.stderr


@pytest.mark.parametrize("text", ["6x10", "6,10,3", "0,5", "5000", "-1", "3.5", "(6,)"])
def test_other_sizes_are_refused_in_one_line(tmp_path, text):
    done = run_main(
        [
            *("--config", "configs/edm/digits_ddpmpp.py", "--mode", "train"),
            *("--workdir", tmp_path, f"--config.data.image_size={text}"),
        ],
        expect=2,
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data.image_size must be a whole number from 0 to 4,096, or a tu")
    assert "a tuple of 2 numbers, each a whole number from 1 to 4,096, not " in line


@pytest.mark.parametrize("name", ["x.npy", "photos"])
def test_sizes_as_the_data_have(tmp_path, name):
    stack = pictures(12, 6, 10, 3)
    if name == "x.npy":
        np.save(tmp_path / name, stack)
    else:
        (tmp_path / name).mkdir()
        for i, image in enumerate(stack):
            (tmp_path / name / f"{i:02}.png").write_bytes(encoded(image))
    config = load("pfgmpp/images16_ddpmpp.py")
    config.data.update(path=str(tmp_path / name), image_size=0)
    assert datasets.get_dataset(config, "train")[:1].shape == (1, 3, 6, 10)
    done, data, lines = complete(config)
    assert done.data.image_size == (6, 10) and data.shape == (3, 6, 10)
    assert any("data.image_size = (6, 10)" in line for line in lines)
    originals = {image.tobytes() for image in stack}
    assert {x.permute(1, 2, 0).numpy().tobytes() for x in data.get("train")} <= originals
    config.data.image_size = (8, 8)
    assert complete(config)[0].data.image_size == 8


def test_open_sizes_of_images_that_differ(tmp_path):
    config = load("pfgmpp/images16_ddpmpp.py")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i, shape in enumerate([(6, 10), (6, 10), (7, 10)]):
            (tmp_path / split / f"{i}.png").write_bytes(encoded(pictures(1, *shape, 3)[0]))
    config.data.update(path=str(tmp_path), image_size=0)
    with pytest.raises(ValueError, match=r"^data.image_size=0 .*6 x 10 to 7 x 10 pixels: set it"):
        complete(config)


def test_digits_and_toys_know_their_size():
    assert complete(digits_of(0))[0].data.image_size == 8
    toy = load("pfgmpp/toy_mlp.py")
    toy.data.image_size = 0
    assert complete(toy)[0].data.image_size == 1


# --- cutting --------------------------------------------------------------------------------------


def test_images_are_cut_to_the_ratio_and_resized():
    (tall,), (wide,) = pictures(1, 31, 20, 3), pictures(1, 12, 40, 3)
    for image, part in ((tall, tall[9:21]), (wide, wide[:, 10:30])):
        expected = resize(part, 6, 10, images.Filter.BICUBIC)
        assert (cropped_then_resized(image, (6, 10)) == expected).all()
    whole = resize(tall, 6, 10)
    assert (images.resized_whole(tall, (6, 10)) == whole).all()
    covering = resize(tall, 16, 10)[5:11]
    assert (images.resized_then_cropped(tall, (6, 10)) == covering).all()
    (face,) = pictures(1, 218, 178, 3)
    assert (images.face(face, (70, 140)) == resize(face[74:144, 19:159], 70, 140)).all()


@given(*[st.integers(1, 70)] * 4)
def test_the_largest_part_touches_two_edges_and_keeps_the_ratio(height, width, new, across):
    part = largest_part((height, width), (new, across))
    assert 1 <= part[0] <= height and 1 <= part[1] <= width
    assert part[0] == height or part[1] == width
    scale = min(height / new, width / across)
    assert abs(part[0] - max(1, scale * new)) <= 0.5
    assert abs(part[1] - max(1, scale * across)) <= 0.5
    assert largest_part((height, width), 9) == (min(height, width),) * 2


def test_words_on_cutting():
    assert changes([(6, 10), (12, 20), (6, 12), (3, 5)], (6, 10)) == [
        "1 of 4 cut to the central part in the ratio 6 : 10",
        "1 of 4 reduced to 6 x 10",
        "1 of 4 enlarged to 6 x 10",
    ]


# --- networks -------------------------------------------------------------------------------------

U_NETS = {
    "ddpm++": ("edm/digits_ddpmpp.py", {}),
    "ncsn++": (
        "edm/digits_ddpmpp.py",
        {"fir": True, "progressive_input": "residual", "progressive": "output_skip"},
    ),
    "skips": (
        "edm/digits_ddpmpp.py",
        {"fir": True, "progressive_input": "input_skip", "progressive": "residual"},
    ),
    "biggan-": ("edm/digits_ddpmpp.py", {"resblock_type": "ddpm", "fir": True}),
    "ddpm": ("edm/digits_ddpmpp.py", {"name": "ddpm"}),
    "edm": ("edm/digits_ddpmpp.py", {"name": "edm_unet"}),
    "adm": ("edm/digits_ddpmpp.py", {"name": "adm", "nf": 32}),
    "edm2": ("edm/digits_ddpmpp.py", {"name": "edm2", "nf": 32, "head_width": 32}),
    "poisson": ("poisson/digits_ddpmpp.py", {}),
}
REFINE_NETS = {
    "ncsn": ("ve/ncsn/cifar10.py", {"num_scales": 5}),
    "ncsnv2": ("ve/ncsnv2/cifar10.py", {"num_scales": 5}),
}
SIZES = [(6, 10), (8, 12), (1, 16)]


def network(name, size):
    path, model = {**U_NETS, **REFINE_NETS}[name]
    if name in U_NETS:
        model = {"ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (4, 8), **model}
    config = digits_of(size, path, **model)
    config.data.num_channels = 2
    torch.manual_seed(0)
    net = models.create_model(config)
    with torch.no_grad():  # the last weights are 0 at first
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.double().eval()


def output(net, x):
    out = net(x, torch.full((len(x),), 2.0, dtype=torch.float64))
    return out[0] if isinstance(out, tuple) else out


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*U_NETS, *REFINE_NETS])
def test_networks_of_any_sides_have_gradients(name, size):
    net, x = network(name, size), noise(2, 2, *size).requires_grad_()
    out = output(net, x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).all()
    for key, parameter in net.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", [*U_NETS, *REFINE_NETS])
def test_a_padded_call_is_that_of_the_padded_image_cut(name):
    """The reference is numpy's padding before a network built for the larger sides."""
    small, large, before, times = ((6, 10), (8, 12), 1, 2)
    if name in REFINE_NETS:  # their levels halve once
        small, large, before, times = ((5, 9), (6, 10), 0, 1)
    net, larger, x = network(name, small), network(name, large), noise(2, 2, *small)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (before, 1), (before, 1)), mode="edge")
    whole = output(larger, torch.from_numpy(padded))
    inside = whole[:, :, before : before + small[0], before : before + small[1]]
    torch.testing.assert_close(output(net, x), inside)
    cost = math.prod(large) / math.prod(small)
    line = f"pads {small[0]} x {small[1]} images to {large[0]} x {large[1]}, since it halves them"
    words = f"the network {line} {times} times: {cost:.2f} times the pixels"
    assert net.remarks == [*larger.remarks, words]


@pytest.mark.parametrize("name", [*U_NETS, *REFINE_NETS])
@pytest.mark.parametrize("size", SIZES)
def test_height_and_width_are_treated_alike(name, size):
    """A network with transposed filters, on transposed images."""
    net, turned, x = network(name, size), network(name, size[::-1]), noise(2, 2, *size)
    with torch.no_grad():
        for parameter in turned.parameters():
            if parameter.dim() == 4:
                parameter.copy_(parameter.mT.clone())
    torch.testing.assert_close(output(turned, x.mT).mT, output(net, x))


@pytest.mark.parametrize("name", ["ddpm++", "ncsn++", "edm", "adm", "edm2", "ncsn"])
def test_a_square_by_one_number_or_two(name):
    one, two, x = network(name, 8), network(name, (8, 8)), noise(1, 2, 8, 8)
    assert torch.equal(output(one, x), output(two, x))
    assert one.state_dict().keys() == two.state_dict().keys()


def test_a_network_takes_other_sides_than_it_was_built_for():
    net, small = network("ddpm++", 8), network("ddpm++", (8, 12))
    for sides in ((16, 8), (12, 20), (9, 7)):
        assert output(net, noise(1, 2, *sides)).shape[2:] == sides
    x = noise(1, 2, 8, 12)
    torch.testing.assert_close(output(small, x).shape, x.shape)


@pytest.mark.parametrize(
    "size, number, sides",
    [
        (32, 3, [(32, 32), (16, 16), (8, 8), (4, 4)]),
        (28, 3, [(32, 32), (16, 16), (8, 8), (4, 4)]),
        (28, 2, [(28, 28), (14, 14), (7, 7)]),
        ((1, 16), 3, [(1, 16), (1, 8), (1, 4), (1, 2)]),
        ((3, 100), 3, [(4, 104), (2, 52), (1, 26), (1, 13)]),
        ((2, 5), 2, [(2, 8), (1, 4), (1, 2)]),
        (1, 2, [(1, 1)] * 3),
    ],
)
def test_halvings(size, number, sides):
    halvings = Halvings.of(size, number)
    assert [*halvings.sides] == sides
    steps = zip(halvings.sides, halvings.factors, sides[1:], strict=False)
    assert all(tuple(s // f for s, f in zip(a, by, strict=True)) == b for a, by, b in steps)


TAPS = [None, (1, 3, 3, 1), (1, 2), (1, 2, 3, 4, 2, 1)]


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("kind", [layers.Double, layers.Halve])
def test_both_axes_are_one_after_the_other(taps, kind):
    x = noise(1, 2, 6, 8)
    both, rows, columns = (kind(taps, factors) for factors in ((2, 2), (2, 1), (1, 2)))
    torch.testing.assert_close(rows(columns(x)), both(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(kind(taps, (1, 1))(x), x)


@pytest.mark.parametrize("taps", TAPS[1:])
def test_resampling_a_row_by_its_definition(taps):
    """Zeros between the pixels, convolution, filter; and the filter, every second convolution."""
    torch.manual_seed(0)
    up, down = (
        layers.Resampling(2, 3, up=grows, fir_kernel=taps, factors=(1, 2)).double()
        for grows in (True, False)
    )
    x, fir, n = noise(1, 2, 1, 8), np.array(taps) / sum(taps), len(taps)
    expected = np.zeros((2, 3, 16))
    for layer, out, gain in ((up, 0, 2), (down, 1, 1)):
        weights = layer.fir_conv.weight.detach().numpy()[:, :, 1]  # the rows above and below are 0
        for i, j in np.ndindex(3, 2):
            row = np.zeros(16) if layer is up else x[0, j, 0].numpy()
            if layer is up:
                row[::2] = x[0, j, 0].numpy()
                whole = np.convolve(np.convolve(row, weights[i, j][::-1]), gain * fir)
                start = 1 + (n - 1) // 2
                expected[out, i] += whole[start : start + 16]
            else:
                blurred = np.convolve(row, fir)[n - 1 - (n + 1) // 2 :][:9]
                halved = np.convolve(blurred, weights[i, j][::-1], mode="valid")[::2]
                expected[out, i, : len(halved)] += halved
    with torch.no_grad():
        np.testing.assert_allclose(up(x)[0, :, 0], expected[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            down(x)[0, :, 0].numpy(), expected[1, :, : down(x).shape[-1]], rtol=1e-6, atol=1e-6
        )


def test_attention_goes_by_the_longer_side():
    config = digits_of((1, 16), ch_mult=(1, 2, 2), attn_resolutions=(8, 5))
    net = models.create_model(config)
    heads = [level["stages"][0].attention is not None for level in net.encoder]
    assert heads == [False, True, False]
    assert net.remarks == [
        "model.attn_resolutions: there is no attention at 5: the longer sides of the network's "
        "levels are 16, 8, 4"
    ]


def test_what_a_refinenet_cannot_take():
    with pytest.raises(ValueError, match=r"more than one pixel, .* halvings .*image_size=\(4, 4\)"):
        RefineNet(layout="256", image_size=(4, 4), conditional=True, sigmas=torch.ones(3))


def test_levels_that_edm_has_no_names_for():
    net = UNet(image_size=(1, 2), nf=4, ch_mult=(1, 1, 1))
    assert net(torch.rand(1, 3, 1, 2), torch.ones(1)).shape == (1, 3, 1, 2)
    config = digits_of((1, 2), name="edm_unet", ch_mult=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="EDM has no names for 4 levels of images of side 2"):
        models.reference_names(models.create_model(config))


# --- augmentation ---------------------------------------------------------------------------------


def parameters(**values):
    """One row: a0=1.0 and so on, 0 for the others."""
    row = torch.zeros(1, 8, dtype=torch.float64)
    for name, value in values.items():
        row[0, int(name[1:])] = value
    return row


def reflected(n, shift):
    index = (torch.arange(n) - shift).abs()
    return torch.where(index > n - 1, 2 * (n - 1) - index, index)


@pytest.mark.parametrize("sides", [(8, 16), (16, 8), (3, 8)])
def test_moves_of_whole_pixels_are_exact(sides):
    image = noise(1, 2, *sides)
    height, width = sides
    for values, expected in (
        ({"a0": 1}, image.flip(-1)),
        ({"a1": 1}, image.flip(-2)),
        ({"a3": math.pi}, image.flip(-1, -2)),
        ({"a6": 1}, image[..., reflected(width, width / 8).long()]),
        ({"a7": 8 / height}, image[:, :, reflected(height, 1).long()]),
    ):
        transformed = transform(image, parameters(**values))
        torch.testing.assert_close(transformed, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sides", [(24, 40), (40, 24)])
@pytest.mark.parametrize(
    "values, source",
    [
        ({"a2": 2.0}, lambda x, y: (x / 2**0.4, y / 2**0.4)),
        ({"a5": 1.5}, lambda x, y: (x / 2**0.3, y * 2**0.3)),
        ({"a3": math.pi / 6}, lambda x, y: (x * 0.75**0.5 - y / 2, x / 2 + y * 0.75**0.5)),
        ({"a3": math.pi / 2}, lambda x, y: (-y, x)),
    ],
)
def test_turns_and_stretches_are_those_of_the_picture_not_of_its_frame(sides, values, source):
    rows, columns = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in sides)
    x, y = torch.meshgrid(columns, rows, indexing="xy")

    def wave(x, y):
        return torch.cos(2 * math.pi * (x / 20 + y / 27) + 0.3)

    transformed = transform(wave(x, y)[None, None], parameters(**values))[0, 0]
    expected = wave(*source(x, y))
    inner = x.hypot(y) < 7
    assert (transformed - expected)[inner].abs().max() < 0.015
    assert (wave(x, y) - expected)[inner].abs().max() > 0.2


def test_sides_too_short_to_be_turned():
    config = digits_of((1, 16), augment_dim=9)
    config.training.augment = 0.1
    with pytest.raises(ValueError, match="whose sides are at least 3, not 1 x 16"):
        Preparation.from_config(config, EightBitImages((1, 1, 16)), False)


# --- restoration and pictures ---------------------------------------------------------------------


def test_what_is_measured_of_images_of_two_sides():
    codec = EightBitImages((3, 8, 12))
    assert measured_shape(codec, "super4") == (3, 2, 3)
    assert measured_shape(codec, "colour") == (1, 8, 12)
    with pytest.raises(ValueError, match=r"'super8' does not divide data.image_size=\(8, 12\)"):
        measured_shape(codec, "super8")


def test_masks_of_two_sides(tmp_path):
    pixels = known_pixels("1,2,4,9", (6, 12), 3)
    missing = torch.zeros(6, 12, dtype=torch.bool)
    missing[1:5, 2:11] = True
    assert torch.equal(pixels, ~missing)
    with pytest.raises(ValueError, match="1,2,6,3 is not within 6 x 12 pixels"):
        known_pixels("1,2,6,3", (6, 12), 3)
    np.save(tmp_path / "mask.npy", missing.numpy())
    assert torch.equal(known_pixels(str(tmp_path / "mask.npy"), (6, 12), 3), ~missing)
    with pytest.raises(ValueError, match=r"has 6 x 12 pixels; the images have 12 x 6"):
        known_pixels(str(tmp_path / "mask.npy"), (12, 6), 3)


def test_long_images_are_not_enlarged_without_bound():
    grid = image_grid(pictures(4, 1, 16, 1))
    assert grid.shape == (2 * (12 + 2) + 2, 2 * (16 * 12 + 2) + 2, 3)


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 12, 3), (6, 10, 1), (1, 16, 2)])
def test_a_run_from_training_to_films(tmp_path, shape):
    """The real program, which measures the sides and keeps them."""
    np.save(tmp_path / "x.npy", pictures(40, *shape))
    folder = str(tmp_path / "run")
    keys = {
        "data.path": tmp_path / "x.npy",
        "data.image_size": 0,
        "training.n_iters": 2,
        "training.batch_size": 8,
        "training.small_batch_size": 0,
        "model.nf": 8,
        "model.ch_mult": "(1,2,2)",
        "training.precision": "fp32",
        "sampling.N": 3,
        "eval.num_samples": 10,
        "eval.batch_size": 10,
        "eval.enable_bpd": True,
        "eval.bpd_num_repeats": 1,
        "eval.stats_dir": tmp_path / "stats",
        "sampling.rtol": 0.1,
        "sampling.atol": 0.1,
    }
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    config = ["--config", "configs/pfgmpp/images16_ddpmpp.py", *flags]
    done = run_main([*config, "--mode", "train", "--workdir", folder])
    height, width, channels = shape
    pads = "the network pads 6 x 10 images to 8 x 12" in done.stderr + done.stdout
    assert pads == (height == 6)
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["data.image_size"] == [height, width]
    run_main(["--mode", "eval", "--workdir", folder, "--trust_workdir"])
    (report,) = (tmp_path / "run/eval").glob("report_*.npz")
    with np.load(report) as file:
        assert np.isfinite([file["fid"], file["bpd"], file["loss"]]).all()
    with np.load(next((tmp_path / "run/eval").glob("ckpt_*/samples_0.npz"))) as file:
        assert file["samples"].shape == (10, *shape)
    sampled = ["--mode", "sample", "--workdir", folder, "--trust_workdir", "--outdir"]
    two = pictures(2, *shape)
    np.save(tmp_path / "two.npy", two)
    run_main(
        [
            *(*sampled, tmp_path / "a", "--config.sampling.seeds=0-1", "--config.sampling.film"),
            f"--config.sampling.encode={tmp_path / 'two.npy'}",
        ]
    )
    with np.load(tmp_path / "a/samples.npz") as file:
        assert file["samples"].shape == (2, *shape)
    with np.load(tmp_path / "a/encoded.npz") as file:
        assert file["decoded"].shape == (2, *shape)
    assert (tmp_path / "a/film.webp").exists()
    run_main(
        [
            *(*sampled, tmp_path / "b", "--config.sampling.seeds=0-1"),
            "--config.sampling.restore=inpaint",
            f"--config.sampling.restore_mask=0,4,{height},4",
            f"--config.sampling.restore_path={tmp_path / 'two.npy'}",
        ]
    )
    with np.load(tmp_path / "b/samples.npz") as file:
        errors = np.abs(file["samples"].astype(int) - two)
    assert errors[:, :, :4].max() <= 1 and errors[:, :, 8:].max() <= 1
    assert errors[:, :, 4:8].max() > 1


def test_derivatives_of_a_padded_call():
    """Derivatives, as likelihoods and restorers take them, agree with finite differences."""
    net, x, step = network("ncsn++", (6, 10)), noise(1, 2, 6, 10), 1e-6
    a, b = noise(2, 2, 6, 10).split(1)
    _, product = torch.autograd.functional.vjp(lambda x: output(net, x), x, a)
    ends = [output(net, x + s * step * b) for s in (1, -1)]
    difference = (a * (ends[0] - ends[1])).sum() / (2 * step)
    torch.testing.assert_close((product * b).sum(), difference, rtol=1e-5, atol=1e-6)


def test_edges_are_repeated():
    x = noise(1, 1, 3, 5)
    margins = Halvings.of((3, 5), 2).margins(x)
    assert margins == [1, 2, 0, 1]
    expected = np.pad(x[0, 0].numpy(), ((0, 1), (1, 2)), mode="edge")
    assert (F.pad(x, margins, mode="replicate")[0, 0].numpy() == expected).all()
