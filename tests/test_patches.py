"""Patches of larger arrays in training, and samples of larger sides by overlapping tiles."""

import numpy as np
import pytest
import torch
from test_arrays import config_of
from test_small_runs import tiny
from test_unit_runs import array, call
from torch import nn
from warm_start import run_main

from completion import complete
from datasets import Data
from experiment import Experiment, load
from models.tiles import Tiled, ramp, starts
from sources.batch import Batch
from sources.codec import from_config as get_codec
from sources.patches import Patches, random_cut
from sources.preparation import Preparation

# --- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float64, torch.bool])
def test_random_patches_lie_anywhere(dtype):
    """Each is a part of its own image; all places are drawn, about as often."""
    images = torch.arange(2 * 6 * 5).view(1, 2, 6, 5).repeat(4000, 1, 1, 1)
    images = images % 2 if dtype is torch.bool else images
    typed = images.to(dtype)
    patches = random_cut(typed, (3, 4), torch.Generator().manual_seed(0))(typed)
    assert patches.dtype == dtype and patches.shape == (4000, 2, 3, 4)
    places = [(top, left) for top in range(4) for left in range(2)]
    parts = torch.stack([images[0, :, t : t + 3, c : c + 4] for t, c in places]).to(dtype)
    hits = (patches[:, None] == parts).flatten(2).all(2)
    assert hits.any(1).all()
    if dtype is not torch.bool:
        assert (hits.sum(1) == 1).all()
        assert hits.sum(0).min() > 4000 / 8 * 0.8 and hits.sum(0).max() < 4000 / 8 * 1.2


def test_a_step_has_other_patches_than_the_next(tmp_path):
    np.save(tmp_path / "x.npy", array("float32", (20, 12, 16, 2)))
    config, data, lines = complete(config_of(tmp_path / "x.npy", image_size=0, patch=(4, 8)))
    codec = get_codec(config)
    assert codec.shape == data.shape == (2, 4, 8) and data.whole_shape == (2, 12, 16)
    prepare = Preparation.from_config(config, codec, shared=False)
    batch = data.get("train", whole=True)[:6]
    assert batch.shape == (6, 2, 12, 16)
    first, again, other = (
        prepare(Batch(batch), torch.Generator().manual_seed(seed)).images for seed in (0, 0, 1)
    )
    assert first.shape == (6, 2, 4, 8)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_all_else_sees_one_patch_of_each_image(tmp_path):
    images = array("float32", (20, 12, 16, 2))
    np.save(tmp_path / "x.npy", images)
    for resident_bytes in (0, 2**31):
        config = config_of(tmp_path / "x.npy", image_size=0, patch=(4, 8))
        config.data.resident_bytes = resident_bytes
        _, data, _ = complete(config)
        patches = data.get("train")[:]
        assert torch.equal(patches, data.get("train")[:])
        whole = data.get("train", whole=True)[:].numpy()
        for patch, image in zip(patches.numpy(), whole, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(image, patch.shape)
            assert (windows == patch).all((3, 4, 5)).sum() == 1
    source = Patches(np.zeros((3, 4, 4, 1)), (2, 2))
    assert source.digest() != Patches(np.zeros((3, 4, 4, 1)), (2, 3)).digest()


def test_patches_that_do_not_fit_are_one_line(tmp_path):
    np.save(tmp_path / "x.npy", array("float32", (20, 6, 6)))
    with pytest.raises(ValueError, match=r"data.patch=\(8, 4\) is larger than the data, 6 x 6$"):
        _, data, _ = complete(config_of(tmp_path / "x.npy", image_size=0, patch=(8, 4)))
        data.get("train")


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 8, 16, 31])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 8, 40])
def test_tiles_cover_everything_and_overlap_by_half(tile, more):
    length = tile + more
    places = starts(length, tile)
    assert places[0] == 0 and places[-1] == length - tile
    steps = np.diff(places)
    assert (steps > 0).all() and (steps <= max(1, (tile + 1) // 2)).all()
    weights = torch.zeros(length)
    for at in places:
        weights[at : at + tile] += ramp(at, length, tile)
    assert weights.min() > 0.05
    assert ramp(0, length, tile)[0] == 1 == ramp(length - tile, length, tile)[-1]


class Local(nn.Module):
    """A network of which each output depends on a neighbourhood of `radius` entries."""

    def __init__(self, radius):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *(layer for _ in range(radius) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.SiLU()))
        ).double()

    def forward(self, x, noise_label, class_labels=None, image=None):
        out = self.layers(x) * noise_label.view(-1, 1, 1, 1)
        out = out if class_labels is None else out + class_labels.view(-1, 1, 1, 1)
        return out if image is None else out + image


@pytest.mark.parametrize("sides", [(16, 16), (17, 16), (24, 40), (50, 21)])
def test_tiles_of_a_local_network_are_exact(sides):
    """Its neighbourhoods are an eighth of a tile of 16; edges and conditions are included."""
    net, generator = Local(2), torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, *sides, dtype=torch.float64, generator=generator)
    label, classes = torch.rand(3, dtype=torch.float64), torch.arange(3.0).double()
    expected = net(x, label, classes, 2 * x)
    result = Tiled(net, (16, 16))(x, label, class_labels=classes, image=2 * x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    if sides != (16, 16):  # larger neighbourhoods make tiles differ
        wide = Local(8)
        result = Tiled(wide, (16, 16))(x, label)
        assert (result - wide(x, label)).abs().max() > 1e-6


def test_tiles_can_be_differentiated():
    x = torch.randn(1, 2, 20, 16, dtype=torch.float64, requires_grad=True)
    net, label = Local(1), torch.ones(1, dtype=torch.float64)
    (expected,) = torch.autograd.grad(net(x, label).square().sum(), x)
    (result,) = torch.autograd.grad(Tiled(net, (16, 16))(x, label).square().sum(), x)
    torch.testing.assert_close(result, expected)
    assert Tiled(net, (16, 16)).state_dict().keys() == net.state_dict().keys()


def test_conditions_of_other_sides_are_one_line(tmp_path):
    net, x, label = Local(1), torch.randn(1, 2, 4, 8), torch.ones(1)
    with pytest.raises(ValueError, match="condition 'image' has 4 x 4 pixels, not the 4 x 8"):
        Tiled(net, (4, 4))(x, label, image=torch.zeros(1, 1, 4, 4))
    config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path)
    config.data.update(conditions="image", patch=(4, 4))
    with pytest.raises(ValueError, match="data.patch cuts images, but not those of data.cond"):
        _ = Data(config.data).shape


def test_what_has_no_tiles_is_one_line(tmp_path):
    config = tiny("poisson/digits_ddpmpp.py", tmp_path)
    with pytest.raises(ValueError, match="the z entry of the field .* cannot be tiled") as caught:
        Experiment.build(config).enlarge((16, 16))
    assert "\n" not in str(caught.value)
    config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path)
    with pytest.raises(ValueError, match=r"sampling.size=\(4, 16\) is smaller than 8 x 8"):
        Experiment.build(config).enlarge((4, 16))


@pytest.mark.slow
def test_a_run_on_patches_draws_larger_samples(tmp_path):
    data, run = array("float32", (30, 20, 24, 2)), tmp_path / "run"
    np.save(tmp_path / "x.npy", data)
    output = call("train", run, data__path=tmp_path / "x.npy", data__patch="(8,8)").stdout
    assert "20 x 24 in random patches of 8 x 8, 2 channels" in output
    call("eval", run)
    with np.load(run / "eval/report_1.npz") as report:
        assert np.isfinite([report[key] for key in ("loss", "fid", "nats")]).all()
    for size, sides in (("()", (8, 8)), ("(20,24)", (20, 24))):
        out = tmp_path / f"out{len(size)}"
        call("sample", run, "--outdir", out, sampling__seeds="0-2", sampling__size=size)
        with np.load(out / "samples.npz") as file:
            assert file["samples"].dtype == np.float32
            assert file["samples"].shape == (3, *sides, 2)
    options = ["--config.sampling.size=(20,24)", f"--config.eval.stats_dir={run}/stats"]
    refused = run_main(["--mode", "eval", "--workdir", run, *options], 2)
    assert "sampling.size is for --mode sample" in refused.stderr
    trained = load(run, {"sampling.size": (12, 8)})
    x = torch.from_numpy(data[:1, :12, :8]).permute(0, 3, 1, 2)
    assert trained.denoise(x, 0.5).shape == x.shape
    plain = load(run)
    assert trained.experiment.origin()["weights"] == plain.experiment.origin()["weights"]
    x, label = torch.zeros(1, 2, 8, 8), torch.ones(1)
    networks = (trained.experiment.network, plain.experiment.network)
    torch.testing.assert_close(*(network(x, label) for network in networks))
