"""Points of the plane: their distributions, the small network, field lines, the page."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from test_configs import TOYS as EXPERIMENTS
from test_configs import load

import datasets
import models
import run_lib
from methods import Poisson
from models.mlp import MLP
from reports import toy as page
from reports.field_lines import exact_slope, field_lines
from reports.images import image_grid
from sources.toys import TOYS

CENTRES = (np.arange(256) + 0.5) / 128 - 1  # centres of the cells of bytes


def coarse(counts):
    """Sums (256,) over 16 x 16 cells of (256, 256) ones."""
    return counts.reshape(16, 16, 16, 16).sum((1, 3)).ravel()


def p_value(points, cells):
    """p of a chi-square test of bytes (n, 2) against their law; rare cells are pooled."""
    counts, expected = np.zeros((256, 256)), len(points) * coarse(cells)
    np.add.at(counts, tuple(points.T), 1)
    often = expected > 5
    counts = coarse(counts)
    pairs = [[*v[often], v[~often].sum()] for v in (counts, expected)]
    return chisquare(*pairs).pvalue


@pytest.mark.parametrize("name", TOYS)
def test_bytes_have_the_mass_of_the_density(name):
    toy = TOYS[name]()
    density = toy.density(CENTRES)
    assert density.sum() / 128**2 == pytest.approx(1, abs=1e-6)
    # the midpoint rule: what it errs by is of the order (cell / std)^2 / 24
    assert np.abs(toy.cells() - density / 128**2).sum() < (1 / 128 / toy.std) ** 2 / 4


@pytest.mark.parametrize("name", TOYS)
def test_draws_have_the_law_of_the_bytes(name):
    toy, random = TOYS[name](), np.random.default_rng(0)
    cells = toy.cells()
    config = load("vp/toy_mlp.py")
    config.data.dataset = name
    train = datasets.get_dataset(config, "train")[:].flatten(1).numpy()
    test = datasets.get_dataset(config, "test")[:].flatten(1).numpy()
    assert p_value(train, cells) > 1e-3
    assert p_value(test, cells) > 1e-3
    # independent draws: the number of a Gaussian, then a point of it
    points = toy.centres[random.integers(len(toy.centres), size=20_000)]
    points = points + toy.std * random.standard_normal(points.shape)
    assert p_value(np.floor((points + 1) * 128).clip(0, 255).astype(int), cells) > 1e-3
    assert p_value(train // 2 + 64, cells) < 1e-9  # the test can fail


def test_entropy_of_gaussians_far_apart():
    toy = TOYS["eight_gaussians"]()
    bits = math.log2(8) + math.log2(2 * math.pi * math.e * toy.std**2) + 2 * 7
    assert toy.bits_per_dim() == pytest.approx(bits / 2, abs=2e-3)


def test_points_are_images_of_one_pixel_only():
    config = load("vp/toy_mlp.py")
    config.data.image_size = 2
    with pytest.raises(ValueError, match="set data.image_size=1, data.num_channels=2"):
        datasets.get_dataset(config, "train")


def test_grid_of_points_is_a_picture_of_the_plane():
    points = np.array([[10, 20], [255, 0]], np.uint8).reshape(-1, 1, 1, 2)
    grid = image_grid(points)
    assert grid.shape == (512, 512, 3)
    dark = np.argwhere(grid[::2, ::2].max(2) == 0)
    assert dark.tolist() == [[255 - 20, 10], [255, 255]]  # row, column
    assert (grid == 0).sum() == 2 * 4 * 3


# --- the network ----------------------------------------------------------------------------------


def test_network_of_any_shape_and_norm():
    net = MLP((3, 2, 4), 5, nf=16, num_blocks=2)
    x = torch.randn(6, 3, 2, 4) * torch.logspace(-9, 9, 6).view(-1, 1, 1, 1)
    out = net(x, torch.logspace(-9, 3, 6))
    assert out.shape == (6, 5, 2, 4)
    assert out.isfinite().all()
    assert out.abs().max() < 1e3  # grows as the logarithm of the norm
    assert torch.allclose(net(x[:1], torch.ones(1)), net(x[:1].double().float(), torch.ones(1)))


def test_network_sees_points_and_labels():
    net, x = MLP((2, 1, 1), 2, nf=16), torch.randn(3, 2, 1, 1, requires_grad=True)
    with torch.no_grad():
        for block in net.blocks:  # a new one starts as the identity
            block.outer.weight.normal_()
    label = torch.tensor([-0.5, 0.01, 20.0], requires_grad=True)
    grads = torch.autograd.grad(net(x, label).square().sum(), (x, label))
    assert all((grad != 0).all() for grad in grads)
    with pytest.raises(ValueError, match=r"data\.num_classes"):
        net(x, label, class_labels=torch.zeros(3, dtype=torch.int64))


def test_network_of_a_field():
    x, z = models.create_model(load("poisson/toy_mlp.py"))(torch.randn(4, 2, 1, 1), torch.ones(4))
    assert (x.shape, z.shape) == ((4, 2, 1, 1), (4,))


# --- lines ----------------------------------------------------------------------------------------


def plane_poisson(**changes):
    numbers = {"sigma_end": 0.01, "tau": 0.03, "M": 260, "restrict_M": True, "gamma": 1e-4}
    numbers |= {"z_max": 17.0, "z_min": 1e-3, "z_exp": 0.0, "upper_norm": 500.0}
    return Poisson(**numbers | changes)


def test_exact_slope_is_that_of_the_exact_field(exact_network):
    charges = 0.5 * torch.randn(50, 2, 1, 1, dtype=torch.float64)
    y, net = 2 * torch.randn(8, 2, 1, 1, dtype=torch.float64), exact_network(charges, 1e-4)
    for z in (0.05, 1.0, 10.0):
        expected = exact_slope(charges, 1.0)(y, z)
        # Poisson flow adds 1e-5 to the field's z entry
        assert torch.allclose(plane_poisson().slope(net, y, z), expected, rtol=1e-2, atol=1e-3)


def test_flat_lines_are_bounded(exact_network):
    charges = torch.rand(50, 2, 1, 1, dtype=torch.float64) - 0.5
    x = torch.tensor([0.3, 3.0, 30.0], dtype=torch.float64).view(3, 1, 1, 1).repeat(1, 2, 1, 1)
    exact, bound = exact_network(charges, 1e-4), plane_poisson(radius=1.0)
    # the exact field is within the bound, also where lines are nearly flat
    assert torch.allclose(bound.slope(exact, x, 0.5), plane_poisson().slope(exact, x, 0.5))

    def wrong(x, z):
        field_x, field_z = exact(x, z)
        return field_x, 0 * field_z + 0.001  # a wrong sign, which a network may give

    assert (plane_poisson().slope(wrong, x, 0.5) * x < 0).flatten(1).any(1)[1:].all()
    slope = bound.slope(wrong, x, 0.5).flatten(1)
    assert (slope * x.flatten(1) > 0).all()
    assert torch.allclose(slope.norm(dim=1), (x.flatten(1).norm(dim=1) + 1) / 0.5)


def test_field_lines_end_at_data_in_proportion():
    where = torch.tensor([[-0.7, 0.1]] * 3 + [[0.5, 0.4]]).view(4, 2, 1, 1)
    lines = field_lines(where, 300, far=50.0)
    assert np.allclose(np.linalg.norm(lines[0], axis=1), 50.0)
    ends = lines[-1, :, :2]
    distance = np.linalg.norm(ends[:, None] - where[[0, 3]].flatten(1).numpy(), axis=2)
    assert np.median(distance.min(1)) < 0.05
    assert (distance.argmin(1) == 0).mean() == pytest.approx(3 / 4, abs=0.02)


# --- from end to end ------------------------------------------------------------------------------


def test_page_and_film(tmp_path, monkeypatch, capsys):
    assert len(EXPERIMENTS) == 3
    config = load("pfgmpp/toy_mlp.py")
    config.training.update(n_iters=2, batch_size=16)
    config.model.update(nf=8, num_res_blocks=1)
    config.data.dataset = "moons"
    assert run_lib.train(config, tmp_path / "PFGM++")
    assert (tmp_path / "PFGM++/samples/iter_2/sample.png").exists()
    few = {"CHARGES": 20, "LINES": 5, "TRAJECTORIES": 2, "STEPS": 4, "TESTED": 4}
    for name, value in (few | {"SAMPLES": 10, "FRAMES": 3}).items():
        monkeypatch.setattr(page, name, value)
    picture, film = tmp_path / "page.png", tmp_path / "film.webp"
    command = ["toy", str(tmp_path / "PFGM++"), "--out", str(picture), "--film", str(film)]
    monkeypatch.setattr("sys.argv", command)
    page.main()
    printed = capsys.readouterr().out
    assert f"entropy of the data  {TOYS['moons']().bits_per_dim():.3f}" in printed
    with Image.open(picture) as image:
        assert image.width > 1000
    with Image.open(film) as image:
        assert image.n_frames == 3
    monkeypatch.setattr("sys.argv", [*command[:1], str(tmp_path), *command[2:]])
    with pytest.raises(SystemExit):
        page.main()
    assert "no checkpoint in" in capsys.readouterr().err
