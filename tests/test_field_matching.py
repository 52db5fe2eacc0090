"""Field matching against electrostatics: fields and lines of charges, fluxes, what plates do."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from known_fields import ExactPlates, moments, toy_points
from scipy import stats

from methods.field import difference_field
from solvers.field_lines import follow, leave, returned

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# --- the field ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 64])
def test_field_of_two_charges(dim):
    generator = torch.Generator().manual_seed(dim)
    positive, negative = torch.randn(2, 1, dim, generator=generator, dtype=torch.float64)
    points = 3 * torch.randn(50, dim + 1, generator=generator, dtype=torch.float64)
    a = points - torch.nn.functional.pad(positive, (0, 1))
    b = points - torch.nn.functional.pad(negative, (0, 1), value=2.5)
    field = a / a.norm(dim=1, keepdim=True) ** (dim + 1) - b / b.norm(dim=1, keepdim=True) ** (
        dim + 1
    )
    computed = difference_field(points, positive, negative, 2.5)
    torch.testing.assert_close(computed, unit(field))


def test_field_of_unequal_numbers_of_charges_is_that_of_equal_plates():
    """Twice the charges at the same places are the same plate."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
    points = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    once = difference_field(points, positive, negative, 1.0)
    twice = difference_field(points, positive, negative.repeat(2, 1), 1.0)
    torch.testing.assert_close(once, twice)


def test_far_away_the_field_is_a_dipole():
    """E = (N+1) (m.u) u - m at the direction u, m from the mean of Q to that of P."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    moment = torch.nn.functional.pad((positive - negative).mean(0), (0, 1), value=-2.0)
    u = unit(torch.randn(30, 4, generator=generator, dtype=torch.float64))
    expected = unit(4 * (u @ moment)[:, None] * u - moment)
    computed = difference_field(1e4 * u, positive, negative, 2.0)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-3)


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.3, 1.2, 2.0, 2.6])
def test_a_line_between_two_charges(angle):
    """Along it cos a - cos b is constant, a and b the angles at the charges (Gauss's law)."""
    charges = torch.zeros(1, 2, dtype=torch.float64)
    direction = partial(difference_field, positive=charges, negative=charges, L=1.0)
    u = torch.tensor([[math.sin(angle), 0.0, math.cos(angle)]], dtype=torch.float64)
    p = path_between(direction, 1e-3 * u)[:, 0]
    assert (p[-1] - torch.tensor([0.0, 0.0, 1.0]).double()).norm() < 0.02
    above = p - torch.tensor([0.0, 0.0, 1.0]).double()
    constant = unit(p)[:, 2] - unit(above)[:, 2]
    assert p[:, 0].max() > (0.05 if angle < 1 else 0.4)
    torch.testing.assert_close(constant, constant[:1].expand(len(p)), rtol=0, atol=2e-3)
    assert constant[0] == pytest.approx(math.cos(angle) + 1, abs=2e-3)


def test_far_lines_of_a_dipole_come_back_mirrored():
    generator = torch.Generator().manual_seed(0)
    moment, *points = torch.randn(21, 5, generator=generator, dtype=torch.float64)
    moment, points = unit(moment), torch.stack(points)
    u = unit(points)
    directions = unit(5 * (u @ moment)[:, None] * u - moment)
    ends = returned(points, directions)
    along = points @ moment
    torch.testing.assert_close(ends @ moment, -along)
    torch.testing.assert_close(ends + along[:, None] * moment, points - along[:, None] * moment)


def path_between(direction, points, **options):
    """Points (steps, B, N+1) of lines from `points` to the plate z = 1."""
    path, luck = [], torch.full_like(points[:, 0], 0.5)
    limits = {"rtol": 1e-6, "atol": 1e-6, "plate": 1.0, "margin": 1e-3}
    follow(direction, points, luck, **limits, **options, record=path.append)
    return torch.stack(path)


def test_taking_far_lines_back_changes_no_end():
    """Of two charges, whose lines go as far as 20 times their distance."""
    positive, negative = torch.tensor([[[0.0, 0.0]], [[0.4, 0.0]]], dtype=torch.float64)
    direction = partial(difference_field, positive=positive, negative=negative, L=1.0)
    angle = torch.linspace(2.5, 3.0, 4, dtype=torch.float64)
    u = torch.stack([angle.sin() * 0.6, angle.sin() * 0.8, angle.cos()], 1)
    whole, short = (path_between(direction, 1e-3 * u, reach=r) for r in (math.inf, 6.0))
    assert whole.norm(dim=2).max() > 9
    # the place where each line comes within 0.1 of its end
    places = []
    for path in (whole, short):
        away = path - torch.tensor([0.4, 0.0, 1.0]).double()
        first = (away.norm(dim=2) < 0.1).double().argmax(0)
        places.append(unit(away[first, torch.arange(4)]))
    torch.testing.assert_close(*places, rtol=0, atol=0.15)


def plates(along, inside, outside):
    """Directions of an even field: E_z `inside` below z = 1 and `outside` above, E_x `along`."""

    def direction(points):
        upwards = torch.where(points[:, 1] < 1, inside, outside)
        return unit(torch.stack([torch.full_like(upwards, along), upwards], 1))

    return direction


@pytest.mark.parametrize(("outside", "share"), [(3.0, 0.0), (1.0, 2 / 3), (-1.0, 1.0)])
def test_as_many_lines_end_at_a_plate_as_it_has_charge(outside, share):
    n = 1000
    points = torch.tensor([[0.0, 0.5]], dtype=torch.float64).repeat(n, 1)
    luck = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    direction = plates(0.7, 3.0, outside)
    limits = {"plate": 1.0, "margin": 1e-2, "max_evaluations": 60}
    ends, evaluations = follow(direction, points, luck, **limits)
    assert evaluations <= 60
    assert ends.isfinite().double().mean().item() == pytest.approx(share, abs=2e-3)
    arrived = ends[ends.isfinite()]
    torch.testing.assert_close(arrived, torch.full_like(arrived, 0.5 * 0.7 / 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("above", "below", "share"), [(2.0, 1.0, 2 / 3), (3.0, -1.0, 1.0)])
def test_lines_leave_either_side_in_proportion_to_its_flux(above, below, share):
    """`above` and `below` are the fluxes away from the plate z = 0."""
    n, x = 2000, torch.zeros(2000, 2, dtype=torch.float64)

    def direction(points):
        upwards = torch.where(points[:, 2] > 0, above, -below)
        return unit(torch.stack([0.4 + 0 * upwards, 0 * upwards, upwards], 1))

    normal = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    luck = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    points = leave(direction, x, normal, luck, 0.01)
    torch.testing.assert_close(points.norm(dim=1), torch.full((n,), 0.01, dtype=torch.float64))
    assert (points[:, 2] > 0).double().mean().item() == pytest.approx(share, abs=2e-3)


def test_lines_of_one_charge_leave_evenly():
    """Around a lone charge both sides have one flux, whatever the distance."""
    charge, far = torch.zeros(1, 3, dtype=torch.float64), torch.full((1, 3), 1e6).double()
    direction = partial(difference_field, positive=charge, negative=far, L=1.0)
    normal = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    luck = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    points = leave(direction, charge.repeat(500, 1), normal, luck, 0.1)
    assert (points[:, 3] > 0).double().mean().item() == pytest.approx(0.5, abs=5e-3)


def test_on_a_line_every_interval_gets_its_flux():
    """In one dimension, each of three equal charges of Q receives a third of all lines."""
    positive = torch.tensor([[-0.5], [0.2]], dtype=torch.float64)
    negative = torch.tensor([[-1.0], [0.1], [0.7]], dtype=torch.float64)
    exact = ExactPlates(positive, negative, L=1.0, z_min=1e-3)
    ends = exact.carry(positive.repeat(600, 1), seed=0)
    assert ends.isfinite().float().mean() > 0.98
    ends = ends[ends.isfinite()]
    nearest = (ends[:, None] - negative.T).abs()
    assert nearest.min(1).values.median() < 1e-3
    shares = nearest.argmin(1).bincount(minlength=3) / len(ends)
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


# --- from density to density ----------------------------------------------------------------------


@pytest.mark.parametrize("L", [1.0, 4.0])
def test_the_exact_field_carries_one_toy_to_the_other(L):
    positive, negative = toy_points("eight_gaussians", 500), toy_points("moons", 500)
    ends = ExactPlates(positive, negative, L, z_min=2e-3).carry(positive, seed=1)
    assert ends.isfinite().all(1).double().mean() > 0.97
    ends = ends[ends.isfinite().all(1)].numpy()
    for moment, expected in zip(moments(ends), moments(negative.numpy()), strict=True):
        assert moment == pytest.approx(expected, abs=0.05)
    for axis in (0, 1):
        assert stats.ks_2samp(ends[:, axis], negative[:, axis].numpy()).statistic < 0.09
    assert np.abs(ends).max() < 1.2
