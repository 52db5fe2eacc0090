"""Restoration against the posterior of Gaussian data, which has a closed form."""

import copy
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import train_state
from known_laws import FAMILY, SDES, denoising_network, pfgmpp, time_of
from PIL import Image

import methods
import run_lib
from configs.poisson import digits_ddpmpp
from configs.vp import digits_ddpmpp as vp_digits
from library.evaluated_restorations import plain_restoration
from methods.base import spread
from methods.guidance import Guided
from methods.restoration import (
    RESTORERS,
    Denoised,
    Measurement,
    Replacement,
    Restoring,
    denoise,
    get_operator,
)
from sampling import get_sampling_fn, solve_ode
from solvers.predictor_corrector import predictor_corrector
from sources.codec import EightBitImages
from storage.checkpoints import save_checkpoint

POISSON = methods.Poisson(
    sigma_end=0.01,
    tau=0.03,
    M=291,
    restrict_M=True,
    gamma=5.0,
    z_max=60.0,
    z_min=1e-3,
    z_exp=0.0,
    upper_norm=150.0,  # about the published bound of N = 4, which cuts off half of the law
)
METHODS = {**SDES, **FAMILY, "pfgmpp2048": pfgmpp(2048.0), "poisson": POISSON}
KNOWN = torch.tensor([[True, True], [False, False]])


class GaussianData:
    """Images N(mean, covariance) of `shape`, with neighbouring pixels and channels alike."""

    def __init__(self, shape, white=False):
        self.shape, n = shape, math.prod(shape)
        generator = torch.Generator().manual_seed(1)
        places = torch.cartesian_prod(*(torch.arange(side) for side in shape)).double()
        covariance = 0.25 * (-torch.cdist(places, places) / 2).exp()
        self.covariance = torch.eye(n).double() if white else covariance
        self.mean = 0.2 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def sample(self, generator):
        noise = torch.randn(len(self.mean), generator=generator, dtype=torch.float64)
        return (self.mean + self.vectors @ (self.values.sqrt() * noise)).view(1, *self.shape)

    def denoise(self, degrees, y, sigma):
        """E[x | y] where y is x and a Student t: a mean over the noise's scale, given y."""
        c = (y.double().flatten(1) - self.mean) @ self.vectors  # along principal components
        if math.isinf(degrees):
            shrunk = c * self.values / (self.values + sigma[:, None] ** 2)
        else:
            n = len(self.mean)  # g lies between what an image of no variance says, and its prior
            low = ((n + degrees) / (degrees + c.square().sum(1) / sigma**2)).log() - 28 / (
                n + degrees
            )
            high = math.log((n + degrees) / degrees) + min(2.5, 12 / degrees**0.5)
            shares = torch.linspace(0, 1, 60, dtype=torch.float64)[:, None, None]
            log_g = (low + shares[..., 0] * (high - low))[..., None]  # (60, B, 1)
            total = self.values + sigma[:, None] ** 2 * (-log_g).exp()  # (60, B, n)
            log_p = 0.5 * degrees * (log_g[..., 0] - log_g[..., 0].exp())
            log_p = log_p - 0.5 * (total.log() + c**2 / total).sum(-1)
            shrunk = (log_p.softmax(0)[..., None] * self.values / total).sum(0) * c
        return (self.mean + shrunk @ self.vectors.T).view_as(y)

    def network(self, method):
        """The network that is exact for these data."""
        denoise = partial(self.denoise, method.degrees_of_freedom)
        if isinstance(method, methods.PFGMPP):
            return denoising_network(denoise)
        if isinstance(method, methods.Poisson):

            def field(x, z):
                g = torch.cat([(denoise(x, z) - x).flatten(1), -z[:, None]], dim=1)
                norm = g.norm(dim=1, keepdim=True)
                g = math.sqrt(x[0].numel()) * g / (norm + method.gamma)
                return g[:, :-1].view_as(x), g[:, -1]

            return field

        def net(x, noise_label):
            t = time_of(method, noise_label)
            alpha, std = method.kernel(t)
            sigma, y = std / alpha, x / spread(alpha, x)
            noise = (y - denoise(y, sigma)) / spread(sigma, y)
            return -noise / spread(std, x) if isinstance(method, methods.VESDE) else noise

        return net

    def posterior(self, measurement):
        """Mean and covariance of x given a measurement of one image."""
        eye = torch.eye(len(self.mean), dtype=torch.float64).view(-1, *self.shape)
        A = measurement.operator.forward(eye).flatten(1).T
        A = A[A.abs().sum(1) > 0]
        value = measurement.value.flatten()
        value = value[measurement.operator.forward(eye).flatten(1).T.abs().sum(1) > 0]
        noise = measurement.noise**2 * torch.eye(len(A))
        gain = self.covariance @ A.T @ torch.linalg.inv(A @ self.covariance @ A.T + noise)
        mean = self.mean + gain @ (value - A @ self.mean)
        return mean, self.covariance - gain @ A @ self.covariance


def measured(data, task, noise):
    """A measurement of a sample of `data`."""
    generator = torch.Generator().manual_seed(2)
    operator = get_operator(task, KNOWN)
    value = operator.forward(data.sample(generator))
    added = torch.randn(data.shape, generator=generator, dtype=torch.float64)
    return Measurement(operator, value + noise * operator.forward(added[None]), noise)


def whitened(x):
    """Rows `x` (n, N), changed a little so that their mean is 0 and their covariance 1."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def errors(
    name,
    task,
    restorer,
    noise=0.0,
    white=False,
    n=4000,
    steps=40,
    corrector="none",
    resample=1,
):
    """Relative errors of mean and covariance of n restorations."""
    method = METHODS[name]
    data = GaussianData((3, 2, 2) if task == "colour" else (1, 2, 2), white)
    one = measured(data, task, noise)
    many = replace(one, value=one.value.expand(n, *one.value.shape[1:]))
    generator, net = torch.Generator().manual_seed(0), data.network(method)
    x = method.prior_sampling((n, *data.shape), generator).double()
    if math.isinf(method.degrees_of_freedom) and restorer != "replacement":
        start = torch.tensor(method.t_prior, dtype=torch.float64)
        std = method.alpha(start) * method.sigma(start)  # leaves the error without that of n draws
        x = std * whitened(x.flatten(1)).view_as(x)
    if restorer == "replacement":
        x = predictor_corrector(
            replace(method, N=steps),
            partial(method.score, net),
            x,
            "euler_maruyama",
            corrector,
            generator,
            noise_removal=True,
            constrain=Replacement(method, many),
            resample=resample,
        )
    else:
        guided = Restoring(method, many, RESTORERS[restorer])
        options = {"schedule": "polynomial", "noise_removal": True}
        x, _ = solve_ode(guided, net, x, "heun", steps, **options)
    x = x if noise else many.project(x)
    x, (mean, covariance) = x.flatten(1), data.posterior(one)
    return (
        ((x.mean(0) - mean).norm() / mean.norm()).item(),
        ((x.T.cov() - covariance).norm() / covariance.norm()).item(),
    )


GAUSSIAN = [*SDES, "edm"]
TASKS = [("inpaint", 0.0), ("inpaint", 0.2), ("super2", 0.2), ("colour", 0.0), ("denoise", 0.3)]


@pytest.mark.parametrize(("task", "noise"), TASKS)
def test_adjoints(task, noise):
    """<A x, m> = <x, A^T m>, and A A^T is `gram` times the identity."""
    operator = get_operator(task, KNOWN.repeat(4, 4))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    image = operator.forward(x)
    m = operator.forward(torch.randn_like(x)) if task == "inpaint" else torch.randn_like(image)
    torch.testing.assert_close((image * m).sum(), (x * operator.adjoint(m)).sum())
    torch.testing.assert_close(operator.forward(operator.adjoint(m)), operator.gram * m)


@pytest.mark.parametrize("name", GAUSSIAN)
@pytest.mark.parametrize(("task", "noise"), TASKS)
def test_moment_matching_is_exact_for_gaussian_noise(name, task, noise):
    mean, covariance = errors(name, task, "moment_matching", noise)
    assert mean < 0.02
    assert covariance < 0.05  # 40 steps of Heun; 80 leave a quarter of it


@pytest.mark.parametrize("name", GAUSSIAN)
def test_dps_is_close_where_the_measurement_is_noisier_than_the_data_vary(name):
    mean, covariance = errors(name, "denoise", "dps", noise=3.0, n=1000)
    assert mean < 0.05
    assert covariance < 0.04


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_dps_takes_the_variance_as_at_least_the_level_times_the_mean_error(noise):
    """The root mean square error of the two pixels that are measured."""
    generator = torch.Generator().manual_seed(0)
    image, value = torch.randn(2, 8, 1, 2, 2, generator=generator)
    measurement = Measurement(get_operator("inpaint", KNOWN), value * KNOWN, noise)
    denoised = Denoised(image, lambda v: v / 3, 0.5, torch.full((8, 1, 1, 1), 0.25))
    error = (value - image) * KNOWN
    rms = (error[:, :, 0].square().sum((1, 2)) / 2).sqrt().view(-1, 1, 1, 1)
    expected = 0.25 / 3 * error / (0.5 * rms).clamp(min=noise**2)
    torch.testing.assert_close(RESTORERS["dps"](measurement, denoised), expected)


@pytest.mark.parametrize(
    ("name", "of_mean", "of_covariance"),
    [("pfgmpp2048", 0.01, 0.03), ("pfgmpp", 0.06, 0.15), ("poisson", 0.1, 0.05)],
)
def test_moment_matching_for_student_t_noise(name, of_mean, of_covariance):
    """The exact flow of the posterior, from equal prior samples, is the reference.

    Equal prior samples let the error of 200 draws cancel. The rest comes from what the
    measurement tells of the noise's scale: much at D = 1 in 4 pixels (docs/benchmarks.md).
    """
    method, data = METHODS[name], GaussianData((1, 2, 2))
    one = measured(data, "inpaint", 0.0)
    many = replace(one, value=one.value.expand(200, *one.value.shape[1:]))
    mean, covariance = data.posterior(one)
    exact = copy.copy(data)
    exact.mean, (exact.values, exact.vectors) = mean, torch.linalg.eigh(covariance)
    exact.values = exact.values.clamp(min=0)
    x = method.prior_sampling((200, 1, 2, 2), torch.Generator().manual_seed(0)).double()
    options = {"solver": "heun", "n": 40, "schedule": "polynomial", "noise_removal": True}
    restoring = Restoring(method, many, RESTORERS["moment_matching"])
    samples = many.project(solve_ode(restoring, data.network(method), x, **options)[0]).flatten(1)
    expected = solve_ode(method, exact.network(method), x, **options)[0].flatten(1)
    assert (samples.mean(0) - expected.mean(0)).norm() < of_mean * mean.norm()
    assert (samples.T.cov() - expected.T.cov()).norm() < of_covariance * covariance.norm()


@pytest.mark.parametrize("D", [1.0, 4.0, 64.0])
def test_the_variance_of_student_t_noise_given_the_noisy_image(D):
    """1 / E[w | y] of points on a line, each with its w = (1 + D) / ((y - x)^2 + D sigma^2)."""
    points = torch.tensor([-0.8, 0.1, 0.6], dtype=torch.float64)

    def shares(y, sigma):
        squared = (y.view(-1, 1) - points).square() + D * sigma**2
        return (-(1 + D) / 2 * squared.log()).softmax(1), (1 + D) / squared

    net = denoising_network(lambda y, sigma: (shares(y, sigma[:, None])[0] @ points).view_as(y))
    y, sigma = torch.linspace(-3, 3, 9, dtype=torch.float64).view(-1, 1, 1, 1), 0.7
    probability, precision = shares(y, sigma)
    expected = 1 / (probability * precision).sum(1)
    torch.testing.assert_close(denoise(pfgmpp(D), net, y, sigma).variance.flatten(), expected)


@pytest.mark.parametrize("name", ["vp", "edm", "poisson"])
def test_restoration_under_guidance(name):
    """Denoisers of Gaussians of one covariance, mixed, are that of a Gaussian of the mixed mean."""
    method, labelled, plain = METHODS[name], GaussianData((1, 2, 2)), GaussianData((1, 2, 2))
    plain.mean, mixed = labelled.mean - 0.3, copy.copy(labelled)
    mixed.mean = plain.mean + 2.0 * (labelled.mean - plain.mean)
    one = measured(mixed, "inpaint", 0.2)
    many = replace(one, value=one.value.expand(400, *one.value.shape[1:]))
    x = method.prior_sampling((400, 1, 2, 2), torch.Generator().manual_seed(0)).double()
    if name == "poisson":  # slopes mix, which is no Gaussian's flow: compared at a point
        y, sigma = 0.5 * x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1), 0.3
        net, other = labelled.network(method), plain.network(method)
        guided = Guided(method, other, 2.0, (0.0, math.inf))
        level = torch.full((400,), sigma)
        c, u = method.slope(net, y, level), method.slope(other, y, level)
        torch.testing.assert_close(guided.slope(net, y, level), u + 2 * (c - u))
        denoised = denoise(guided, net, y, sigma)
        torch.testing.assert_close(denoised.image, y - sigma * (u + 2 * (c - u)))
        return
    start = torch.tensor(method.t_prior, dtype=torch.float64)
    std = method.alpha(start) * method.sigma(start)
    x = std * whitened(x.flatten(1)).view_as(x)
    guided = Guided(method, plain.network(method), 2.0, (0.0, math.inf))
    restoring = Restoring(guided, many, RESTORERS["moment_matching"])
    options = {"schedule": "polynomial", "noise_removal": True}
    x, _ = solve_ode(restoring, labelled.network(method), x, "heun", 40, **options)
    mean, covariance = mixed.posterior(one)
    x = x.flatten(1)
    assert (x.mean(0) - mean).norm() / mean.norm() < 0.02
    assert (x.T.cov() - covariance).norm() / covariance.norm() < 0.05


def test_pigdm_is_exact_for_white_data():
    for task, noise in (("inpaint", 0.2), ("denoise", 0.3)):
        assert max(errors("edm", task, "pigdm", noise, white=True)) < 0.05


def test_resampling_brings_replacement_closer():
    plain = errors("vp", "inpaint", "replacement", steps=200, n=2000)
    repeated = errors("vp", "inpaint", "replacement", steps=200, n=2000, resample=5)
    assert repeated[0] < 0.5 * plain[0]


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("options", [{"resample": 5}, {"corrector": "langevin"}])
def test_replacement_keeps_to_a_noisy_measurement(name, options):
    """Repeats and correctors stop below the measurement's noise level, lest it be forgotten."""
    mean, covariance = errors(name, "super2", "replacement", 0.2, steps=200, n=2000, **options)
    assert mean < 0.06
    assert covariance < 0.2


# --- a mask for each image ------------------------------------------------------------------------

MASKS = torch.stack([KNOWN, KNOWN.T, ~KNOWN, torch.eye(2).bool()])[:, None]


def measured_through(masks, noise):
    """Four images, or as many as there are `masks`, and a state y of each."""
    x, y = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(3)).double()
    return Measurement(get_operator("inpaint", masks), MASKS * x, noise), y


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", ["edm", "vp", "pfgmpp2048"])
@pytest.mark.parametrize("restorer", ["moment_matching", "pigdm", "dps"])
def test_each_image_is_restored_through_its_mask_as_if_alone(restorer, name, noise):
    method, data = METHODS[name], GaussianData((1, 2, 2))
    net, (together, y) = data.network(method), measured_through(MASKS, noise)
    slope = Restoring(method, together, RESTORERS[restorer]).slope(net, y, 0.7)
    for i, mask in enumerate(MASKS[:, 0]):
        one = Measurement(get_operator("inpaint", mask), together.value[i : i + 1], noise)
        alone = Restoring(method, one, RESTORERS[restorer]).slope(net, y[i : i + 1], 0.7)
        torch.testing.assert_close(slope[i : i + 1], alone)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_each_image_is_replaced_through_its_mask(noise):
    method, (together, y) = METHODS["vp"], measured_through(MASKS, noise)
    t = torch.tensor(0.9, dtype=torch.float64)
    seeded = [torch.Generator().manual_seed(i) for i in range(4)]
    replaced = Replacement(method, together)(seeded, y, t)
    for i, mask in enumerate(MASKS[:, 0]):
        one = Measurement(get_operator("inpaint", mask), together.value[i : i + 1], noise)
        alone = Replacement(method, one)(torch.Generator().manual_seed(i), y[i : i + 1], t)
        torch.testing.assert_close(replaced[i : i + 1], alone)
    torch.testing.assert_close(replaced[~MASKS], y[~MASKS])


@pytest.mark.parametrize("name", ["inpaint", "colour", "super2", "denoise"])
def test_the_picture_of_a_measurement_agrees_with_it(name):
    """The picture of a measurement of colour is grey, not the least change that explains it."""
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    operator = get_operator(name, torch.rand(4, 4) < 0.5)
    measurement = Measurement(operator, operator.forward(x))
    picture = measurement.picture()
    assert picture.shape == x.shape
    torch.testing.assert_close(operator.forward(picture), measurement.value)
    if name == "colour":
        assert torch.equal(picture, picture[:, :1].expand(-1, 3, -1, -1))


def test_a_plain_restoration_without_training_images_is_remarked():
    """A restoration without training images starts from grey, and keeps the measured pixels."""

    def get(split, labels):
        raise FileNotFoundError("no digits here")

    codec = EightBitImages((1, 4, 4))
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    operator = get_operator("inpaint", torch.arange(16).view(4, 4) % 3 > 0)
    measurement = Measurement(operator, operator.forward(codec.encode(x)))
    experiment = SimpleNamespace(codec=codec, device="cpu", data=SimpleNamespace(get=get))
    plain, remark = plain_restoration(experiment, measurement)
    assert remark == "the plain restorations start from grey, not the mean image: no digits here"
    mask = operator.forward(torch.ones(1, 1, 4, 4)).bool()
    torch.testing.assert_close(codec.decode(plain), torch.where(mask, x, 0.5))


def test_a_draw_has_twice_the_error_of_the_mean():
    """The sentence on the page: PSNR falls by 3 dB for one restoration, by 0.8 dB for five."""
    generator = torch.Generator().manual_seed(0)
    truth, *draws = torch.randn(6, 100_000, generator=generator)  # one posterior, of mean 0
    errors = [(draws[0] - truth).square().mean(), (sum(draws) / 5 - truth).square().mean()]
    assert [e.item() for e in errors] == pytest.approx([2, 1.2], rel=0.02)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0, 0, 2])])
def test_rows_of_a_measurement_take_their_masks_along(rows):
    together, _ = measured_through(MASKS, 0.3)
    part, x = together[rows], torch.ones(len(MASKS[rows]), 1, 2, 2).double()
    assert torch.equal(part.value, together.value[rows])
    assert torch.equal(part.operator.forward(x).bool(), MASKS[rows])
    assert torch.equal(part[:1].operator.forward(x[:1]).bool(), MASKS[rows][:1])
    shared = Measurement(get_operator("inpaint", KNOWN), together.value)[rows]
    assert torch.equal(shared.operator.forward(x).bool(), KNOWN.expand(len(x), 1, 2, 2))


# --- by the program -------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A function (restore, **sampling keys) -> the report, of a small untrained network."""
    config = digits_ddpmpp.get_config()
    config.model.update(nf=8, ch_mult=(1,))
    config.training.n_iters = 8
    config.sampling.ode_solver, config.sampling.N = "heun", 3
    config.eval.update(batch_size=10, enable_loss=False, enable_bpd=False, enable_sampling=False)
    state = train_state(config)
    state.step = 4 * config.training.snapshot_freq
    save_checkpoint(tmp_path / f"run/checkpoints/checkpoint_{state.step}.pth", state.state_dict())
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(3):
        image = Image.fromarray(random.integers(256, size=(8, 8), dtype=np.uint8))
        image.save(tmp_path / f"images/{i}.png")

    def restore(task, degrade=True, **keys):
        config.sampling.update(restore=task, restore_degrade=degrade)
        config.sampling.update({"restore_path": str(tmp_path / "images"), **keys})
        run_lib.evaluate(config, tmp_path / "run")
        with np.load(tmp_path / "run/eval/report_4.npz") as file:
            return dict(file)

    restore.folder = tmp_path
    return restore


def restored(run):
    arrays = []
    for i in range(2):  # two images at once, then one, each five times
        with np.load(run.folder / f"run/eval/ckpt_4_restored_{i}.npz") as file:
            arrays.append(file["restored"])
    return np.concatenate(arrays).reshape(3, 5, 8, 8)


@pytest.mark.parametrize("restorer", ["moment_matching", "pigdm", "dps"])
def test_known_pixels_come_back_unchanged(run, restorer):
    report = run("inpaint", restore_mask="4,0,4,8", restorer=restorer)
    images = np.stack([np.asarray(Image.open(run.folder / f"images/{i}.png")) for i in range(3)])
    results = restored(run)
    assert (results[:, :, :4] == images[:, None, :4]).all()
    assert (results[:, :, 4:] != images[:, None, 4:]).any()
    assert report["restore_images"] == 3
    error = ((results - images[:, None].astype(float)) ** 2).mean((2, 3))
    expected = (10 * np.log10(255**2 / error)).mean()
    assert report["restore_psnr"] == pytest.approx(expected)
    assert report["restore_spread"] == pytest.approx(math.sqrt(results.var(1, ddof=1).mean()) / 255)
    assert "Restoration" in (run.folder / "run/eval/report.html").read_text()


def test_a_mask_is_white_where_pixels_are_missing(run):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:] = 255
    Image.fromarray(mask).save(run.folder / "mask.png")
    run("inpaint", restore_mask=str(run.folder / "mask.png"))
    images = np.stack([np.asarray(Image.open(run.folder / f"images/{i}.png")) for i in range(3)])
    assert (restored(run) == images[:, None])[:, :, mask == 0].all()


def write_masks(folder, count, white=lambda k: np.s_[2 * k : 2 * k + 3]):
    """`count` masks of 8 x 8; of mask k the pixels `white(k)` are missing."""
    folder.mkdir()
    masks = np.zeros((count, 8, 8), np.uint8)
    for k, mask in enumerate(masks):
        mask[white(k)] = 255
        Image.fromarray(mask).save(folder / f"{k}.png")
    return masks


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_has_a_mask_for_each_image(run, packed, caplog):
    caplog.set_level("INFO")
    masks, path = write_masks(run.folder / "masks", 3), run.folder / "masks"
    if packed:
        path = shutil.make_archive(str(path), "zip", path)
    report = run("inpaint", restore_mask=str(path))
    images = np.stack([np.asarray(Image.open(run.folder / f"images/{i}.png")) for i in range(3)])
    same = (restored(run) == images[:, None]).all(1)
    assert same[masks == 0].all()
    assert not same[masks == 255].all()
    assert report["restore_psnr"] > 0
    assert "3 masks, one for each image" in caplog.text


def test_a_folder_of_one_mask_is_for_all_images(run):
    masks = write_masks(run.folder / "masks", 1)
    run("inpaint", restore_mask=str(run.folder / "masks"))
    images = np.stack([np.asarray(Image.open(run.folder / f"images/{i}.png")) for i in range(3)])
    assert (restored(run) == images[:, None])[:, :, masks[0] == 0].all()


@pytest.mark.parametrize(
    ("count", "white", "says"),
    [
        (2, np.s_[:4], "holds 2 masks for 3 images: it takes one for each"),
        (4, np.s_[:4], "holds 4 masks for 3 images"),
        (3, np.s_[:0], "masks: 0.png marks no pixel"),
        (3, np.s_[:], "masks: 0.png marks all pixels"),
    ],
)
def test_masks_that_do_not_fit_are_one_line(run, count, white, says):
    write_masks(run.folder / "masks", count, lambda k: white)
    with pytest.raises(ValueError, match=says) as caught:
        run("inpaint", restore_mask=str(run.folder / "masks"))
    assert "\n" not in str(caught.value)


def test_measured_images_have_no_truth(run):
    report = run("super2", degrade=False)
    assert report["restore_images"] == 3
    assert "restore_psnr" not in report
    assert run("denoise", restore_noise=0.2)["restore_psnr"] > 0


@pytest.mark.parametrize("restorer", ["moment_matching", "pigdm", "dps"])
@pytest.mark.parametrize("name", ["edm", "vp", "poisson", "pfgmpp2048"])
def test_the_slope_leads_to_images_within_their_bounds(name, restorer):
    """Bounds hold even for a network that errs by 3 in every image."""
    method, data = METHODS[name], GaussianData((1, 2, 2))
    method = replace(method, gamma=0.0) if name == "poisson" else method
    denoise_wrongly = data.denoise
    data.denoise = lambda degrees, y, sigma: 3 + denoise_wrongly(degrees, y, sigma)
    one, net = measured(data, "super2", 0.0), data.network(method)
    y = 10 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    many = replace(one, value=one.value.expand(8, *one.value.shape[1:]))
    assert (method.denoise(net, y, torch.tensor(2.0)) > 1.1).any()
    assert (denoise(method, net, y, 2.0, (0.0, 1.0)).image <= 1).all()
    slope = Restoring(method, many, RESTORERS[restorer], (0.0, 1.0)).slope(net, y, 2.0)
    image = y - 2.0 * slope
    assert (image > -1e-9).all()
    assert (image < 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("task", "keys", "says"),
    [
        ("inpaint", {}, "needs sampling.restore_mask"),
        ("inpaint", {"restore_mask": "none.png"}, "sampling.restore_mask=none.png does not exist"),
        ("inpaint", {"restore_mask": "4,4,8,1"}, "is not within 8 x 8"),
        ("inpaint", {"restore_mask": "0,0,8,8"}, "marks all pixels"),
        ("inpaint", {"restore_mask": "0,0,0,8"}, "marks no pixel"),
        ("super2", {"restore_path": "", "degrade": False}, "needs sampling.restore_path"),
        ("super2", {"restore_path": "none"}, "sampling.restore_path=none does not exist"),
        ("super2", {"restorer": "replacement"}, "needs an SDE's sampling.method='pc'"),
        ("super2", {"restorer": "magic"}, "sampling.restorer must be one of"),
        ("super3", {}, "sampling.restore must be one of"),
        ("colour", {}, "needs colour images; these have 1"),
        ("denoise", {}, "needs a sampling.restore_noise above 0"),
        ("super2", {"restore_resample": 2}, "needs sampling.restorer='replacement'"),
    ],
)
def test_bad_input_is_one_line(run, task, keys, says):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(task, **keys)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_size(run):
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(run.folder / "mask.png")
    with pytest.raises(ValueError, match="has 8 x 9 pixels; the images have 8 x 8"):
        run("inpaint", restore_mask=str(run.folder / "mask.png"))


def replacing(noise, **options):
    """The sampler by replacement of VP in 50 steps, each with predictor and corrector, twice."""
    config = vp_digits.get_config()
    config.model.num_scales = 50
    config.sampling.update(method="pc", predictor="euler_maruyama", corrector="langevin")
    config.sampling.update(restorer="replacement", restore_resample=2)
    config.sampling.update(**options)
    method, value = methods.get_method(config), torch.rand(4, 1, 8, 8) * 2 - 1
    measurement = Measurement(get_operator("inpaint", KNOWN.repeat(4, 4)), value, noise)
    measurement = replace(measurement, value=measurement.operator.forward(value))
    sampler = replace(get_sampling_fn(config, method), measurement=measurement)
    return method, value, sampler


def test_replacement_keeps_known_pixels_and_is_repeatable():
    _, value, sample = replacing(noise=0.0)
    restorations = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        images, evaluations = sample(lambda x, label: x, num=4, generator=generator)
        restorations.append(images)
    assert evaluations == 50 * 2 * 2
    mask = KNOWN.repeat(4, 4).expand_as(value)
    torch.testing.assert_close(restorations[0][mask], ((value + 1) / 2)[mask], rtol=0, atol=1e-6)
    assert torch.equal(*restorations)


def test_replacement_repeats_and_corrects_down_to_the_noise_of_the_measurement():
    method, _, sample = replacing(noise=0.3)
    _, evaluations = sample(lambda x, label: x, num=4, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(method.t_prior, method.t_data, 50, dtype=torch.float64)
    noisier = [method.sigma(t).item() >= 0.3 for t in times]
    above = sum([*noisier[1:], noisier[-1]])  # steps, by the noise where they end
    assert 30 < above < 50
    assert evaluations == above * 2 * 2 + (50 - above)


@pytest.mark.parametrize("options", [{"predictor": "none"}, {"probability_flow": True}])
def test_a_noisy_measurement_needs_a_step_that_draws(options):
    with pytest.raises(
        ValueError, match=r"needs a predictor \(not .* and no sampling.probability_flow"
    ):
        replacing(noise=0.3, restore_resample=1, **options)
    replacing(noise=0.0, restore_resample=1, **options)
