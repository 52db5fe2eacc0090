"""Draws given a condition, against posteriors in closed form; PSNR, SSIM and coverage of draws."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from known_laws import VP, pfgmpp

from library.evaluated import Evaluated, Split
from library.evaluated_pairs import compare_pairs, coverages, rank_shares
from reports.paired import ranks_of
from reports.table import report_table
from samplers.consistency import ConsistencySampler
from samplers.ode import ODESampler
from samplers.start import ConditionStart
from sources.batch import Conditions
from sources.measured_arrays import MeasuredArrays
from sources.stream import Resident

SHAPE, NOISE = (1, 2, 2), 0.3  # of the images, and the deviation of what conditions add
DIM = math.prod(SHAPE)
QUADRATURE = 150
CODEC = MeasuredArrays(SHAPE, "float32", (0.0,), (0.5,), (-2.0, 2.0))  # x is the data


class GaussianPairs:
    """y ~ N(0, S) and c = y + NOISE n, with the exact denoiser of y given c at any D.

    A Student t is a Gaussian of the scale sigma / sqrt(g), g ~ Gamma(D / 2, rate D / 2). Given g
    the denoised image is that of Gaussians; over g it is averaged by quadrature in log g.
    """

    def __init__(self):
        half = torch.randn(
            DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        self.prior = 0.25 * (half @ half.T / DIM + 0.1 * torch.eye(DIM, dtype=torch.float64))
        inverse = torch.linalg.inv(self.prior) + torch.eye(DIM) / NOISE**2
        self.posterior = torch.linalg.inv(inverse)
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.posterior)

    def mean(self, condition):
        """The posterior mean (n, DIM) given conditions (n, ...)."""
        return condition.flatten(1).double() @ self.posterior / NOISE**2

    def draw(self, n, seed=0):
        """Images and conditions (n, *SHAPE)."""
        normal = torch.randn(2, n, DIM, dtype=torch.float64, generator=seeded(seed))
        images = normal[0] @ torch.linalg.cholesky(self.prior).T
        return [x.unflatten(1, SHAPE).float() for x in (images, images + NOISE * normal[1])]

    def network(self, method):
        """F of `method` with which it denoises exactly."""
        D = method.D
        log_g, log_weight = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        if math.isfinite(D):
            width = 12 / math.sqrt(D)
            log_g = torch.linspace(-2 * width, width, QUADRATURE, dtype=torch.float64)
            log_weight = D / 2 * (log_g - log_g.exp())
        values, vectors = self.eigenvalues, self.eigenvectors

        def denoised(x, sigma, condition):
            mean = self.mean(condition)
            z = (x.flatten(1).double() - mean) @ vectors
            variances = values + sigma**2 / log_g.exp()[:, None]
            log_p = log_weight - 0.5 * variances.log().sum(1) - 0.5 * z**2 @ (1 / variances).T
            shrink = log_p.softmax(1) @ (values / variances)
            return (mean + (shrink * z) @ vectors.T).view_as(x)

        def net(x_in, label, image):
            sigma = (4 * label[0]).exp().double()
            t = method.time(sigma)
            precondition = method.precondition
            x = x_in / precondition.c_in(t).to(x_in)
            image_part = denoised(x, sigma, image) - precondition.c_skip(t) * x
            return (image_part / precondition.c_out(t)).to(x_in)

        return net


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pairs():
    return GaussianPairs()


@pytest.mark.parametrize("D", [math.inf, 64.0, 4.0])
def test_draws_are_from_the_posterior(pairs, D):
    method, n = pfgmpp(D), 2000
    sampler = ODESampler(method=method, codec=CODEC, solver="unipc", n=40)
    for seed in (3, 4):
        _, condition = pairs.draw(1, seed)
        conditions = {"image": condition.expand(n, *SHAPE)}
        draws, _ = sampler(pairs.network(method), n, generator=seeded(seed), conditions=conditions)
        draws, posterior = draws.flatten(1).double(), pairs.posterior
        error = (posterior.diag() / n).sqrt()
        assert ((draws.mean(0) - pairs.mean(condition)[0]).abs() < 4.5 * error).all()
        deviation = (torch.outer(posterior.diag(), posterior.diag()) + posterior**2).sqrt() / n**0.5
        assert ((draws.T.cov() - posterior).abs() < 4.5 * deviation).all()


# --- evaluation -----------------------------------------------------------------------------------


def evaluated_by(sampler, pairs, folder, batch_size):
    """`Evaluated` of the exact network of `pairs`."""
    experiment = SimpleNamespace(
        method=sampler.method,
        codec=CODEC,
        condition_codec=CODEC,
        sampler=sampler,
        network=pairs.network(sampler.method),
        device=torch.device("cpu"),
    )
    options = {"experiment": experiment, "folder": folder, "k": 1, "origin": {"weights": ""}}
    return Evaluated(**options, seed=0, batch_size=batch_size)


@pytest.mark.parametrize("D", [math.inf, 16.0])
def test_an_evaluation_of_exact_draws(pairs, tmp_path, D):
    n, draws = 250, 9
    images, conditions = pairs.draw(n, seed=5)
    sampler = ODESampler(method=pfgmpp(D), codec=CODEC, solver="unipc", n=40)
    evaluated = evaluated_by(sampler, pairs, tmp_path, 900)
    split = Split("test", Resident(images, Conditions(image=conditions)))
    report = compare_pairs(evaluated, split, 1000, draws)
    assert report["pairs_images"] == n and report["pairs_nfe"] == 40
    for key in ("pairs_coverage", "pairs_coverage_inner"):
        expected, error = report[f"{key}_expected"], report[f"{key}_error"]
        i, j = ranks_of(key, report)
        assert expected == pytest.approx((j - i) / (draws + 1))
        assert abs(report[key] - expected) < 4 * error < 0.1
    assert report["pairs_ranks"].sum() == pytest.approx(1)
    # mean squared errors: 2 P of a draw, (1 + 1 / K) P of the mean, NOISE^2 of the condition
    files = sorted(tmp_path.glob("ckpt_1_pairs_*.npz"))
    stored = [np.load(tmp_path / f"ckpt_1_pairs_{i}.npz")["draws"] for i in range(len(files))]
    stored = np.concatenate(stored).reshape(n, draws, 2, 2, 1).transpose(0, 1, 4, 2, 3)
    trace, truth = pairs.posterior.trace().item() / DIM, images.numpy()
    for name, estimate, expected in (
        ("", stored[:, 0], 2 * trace),
        ("_mean", stored.mean(1), (1 + 1 / draws) * trace),
        ("_condition", conditions.numpy(), NOISE**2),
    ):
        squared = np.square(estimate - truth).reshape(n, -1).mean(1)
        assert squared.mean() == pytest.approx(expected, rel=0.15)
        clipped = np.maximum(squared / 16, 1 / 12 / 255**2)  # the window is 4 wide
        assert report[f"pairs_psnr{name}"] == pytest.approx(
            -10 * np.log10(clipped).mean(), abs=1e-3
        )
    assert report["pairs_spread"] == pytest.approx(trace**0.5 / 4, rel=0.05)
    before = {path: path.stat().st_mtime_ns for path in files}
    assert compare_pairs(evaluated, split, 1000, draws)["pairs_psnr"] == report["pairs_psnr"]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert evaluated.picture("pairs").exists()


class Diverging(ODESampler):
    """A sampler that diverges for the conditions above 1."""

    def __call__(self, net, num, *, conditions, **options):
        if (conditions["image"] > 1).any():
            raise FloatingPointError("the state is not finite after the step to 0.3")
        return super().__call__(net, num, conditions=conditions, **options)


def test_pairs_for_which_the_solver_diverges_do_not_count(pairs, tmp_path, caplog):
    images, conditions = (rows.clamp(-1, 1) for rows in pairs.draw(10, seed=5))
    conditions[5] = 2  # of the third round of two pairs
    sampler = Diverging(method=pfgmpp(16.0), codec=CODEC, solver="heun", n=3)

    def report(rows):
        split = Split("test", Resident(images[rows], Conditions(image=conditions[rows])))
        return compare_pairs(evaluated_by(sampler, pairs, tmp_path, 9), split, 10, 4)

    all_rows = report(slice(None))
    assert (all_rows["pairs_images"], all_rows["pairs_nonfinite"]) == (8, 2)
    assert "round 2: none of its 2 pairs counts: the state is not finite after" in caplog.text
    assert "2 of 10 pairs do not count" in caplog.text
    draws = [np.load(tmp_path / f"ckpt_1_pairs_{i}.npz")["draws"] for i in (0, 1, 3, 4)]
    squared = (
        np.concatenate(draws).reshape(8, 4, 4)[:, 0]
        - images[[0, 1, 2, 3, 6, 7, 8, 9]].flatten(1).numpy()
    )
    expected = -10 * np.log10(np.square(squared / 4).mean(1)).mean()
    assert all_rows["pairs_psnr"] == pytest.approx(expected)
    table = report_table(all_rows | {"seconds": 1.0}, "test", "")
    assert re.search("pairs whose draws are not finite +2", table)
    none = report([5])
    assert none.keys() == {"pairs_nonfinite", "pairs_seconds"}
    assert re.search("not finite +1", report_table(none | {"seconds": 1.0}, "test", ""))


def test_ranks_are_those_of_sorted_draws():
    random = np.random.default_rng(0)
    draws, truth = random.normal(size=(5, 4, 3, 3, 1)), random.normal(size=(5, 3, 3, 1))
    expected = np.zeros((5, 5))
    for i in range(5):
        for where in np.ndindex(3, 3, 1):
            ordered = sorted([*draws[i][(slice(None), *where)], truth[i][where]])
            expected[i, ordered.index(truth[i][where])] += 1 / 9
    np.testing.assert_allclose(rank_shares(draws, truth), expected)
    report = coverages(rank_shares(draws, truth)) | {"pairs_draws": 4}
    inside = ((draws.min(1) < truth) & (truth < draws.max(1))).mean()
    assert report["pairs_coverage"] == pytest.approx(inside)
    assert report["pairs_coverage_expected"] == pytest.approx(3 / 5)


def test_equal_whole_numbers_share_their_ranks():
    """Draws and truth of one law have even ranks, though many of the numbers are equal."""
    random = np.random.default_rng(0)
    numbers = random.integers(0, 3, (400, 10, 6, 6, 1), dtype=np.uint8)
    shares = rank_shares(numbers[:, 1:], numbers[:, 0])
    np.testing.assert_allclose(shares.mean(0), 0.1, atol=0.01)
    same = np.ones((2, 4, 3, 3, 1), np.uint8)
    np.testing.assert_allclose(rank_shares(same, same[:, 0]), 1 / 5)


# --- starts at the condition ----------------------------------------------------------------------

DATA = MeasuredArrays(SHAPE, "float32", (2.0,), (3.0,))
CONDITION = MeasuredArrays(SHAPE, "float64", (1.0,), (5.0,))


def looking(x, label, image):
    """A network whose output depends on every input."""
    return torch.sin(x) + 0.1 * label.view(-1, 1, 1, 1) - image.flip(-1)


@pytest.mark.parametrize("method", [pfgmpp(64.0), pfgmpp(math.inf), VP])
@pytest.mark.parametrize("consistency", [False, True])
def test_one_evaluation_from_the_condition(method, consistency):
    level, weight = 0.7, 0.4
    start = ConditionStart(level, weight, CONDITION)
    parts = {"method": method, "codec": DATA, "start": start}
    sampler = ODESampler(**parts, solver="heun", n=1)
    if consistency:
        sampler = ConsistencySampler(**parts, n=1)
    measured = 4 * torch.randn(3, *SHAPE, dtype=torch.float64) + 1
    image = ((measured - 1) * 0.5 / 5).float()
    results, evaluations = sampler(looking, 3, generator=seeded(0), conditions={"image": image})
    y = (measured - 2) * 0.5 / 3  # as the method sees the data
    f = method.denoise(looking, y.float(), level, image=image)
    expected = (weight * f + (1 - weight) * y) * 3 / 0.5 + 2
    assert evaluations == 1
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


def test_further_evaluations_start_from_the_condition_too():
    method, level = pfgmpp(32.0), 0.9
    parts = {"method": method, "codec": DATA, "start": ConditionStart(level, 1.0, DATA)}
    image = torch.randn(3, *SHAPE)
    conditions = {"image": image}
    sampler = ODESampler(**parts, solver="forward_euler", n=2, schedule="logsnr")
    results, evaluations = sampler(looking, 3, generator=seeded(0), conditions=conditions)
    middle = 0.002  # noise_removal: the second of the two steps leads from here to 0

    def conditioned(x, label):
        return looking(x, label, image)

    x = image + (middle - level) * method.slope(conditioned, image, level)
    x = x - middle * method.slope(conditioned, x, middle)
    assert evaluations == 2
    torch.testing.assert_close(results, DATA.decode(x), rtol=1e-5, atol=1e-5)

    sampler, prior = ConsistencySampler(**parts, n=2, levels=(0.3,)), torch.zeros_like(image)
    results, evaluations = sampler(looking, x=prior, generator=seeded(0), conditions=conditions)
    x = method.denoise(looking, image, level, image=image)
    normal, width = method.noise(x, seeded(0))
    x = method.denoise(
        looking, x + 0.3 * width.view(-1, 1, 1, 1).float() * normal, 0.3, image=image
    )
    assert evaluations == 2
    torch.testing.assert_close(results, DATA.decode(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs sampling.levels"):
        ConsistencySampler(**parts, n=2)
    with pytest.raises(ValueError, match="noise levels that fall between 0.9"):
        ConsistencySampler(**parts, n=2, levels=(1.5,))
    with pytest.raises(ValueError, match="the samples have no condition"):
        sampler(looking, 3, generator=seeded(0))
