"""Metrics against closed forms, slow definitions and tensorflow-gan; feature spaces made here."""

import socket
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree
from scipy.special import softmax
from scipy.stats import entropy

from metrics import distances, features, networks
from metrics.distances import (
    OURS,
    Gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)
from metrics.features import get_space
from metrics.reference import Reference
from metrics.table import METRICS, Comparison, compare
from sources.codec import EightBitImages

CPU = torch.device("cpu")


def random_gaussian(seed, dim, rank=None):
    random = np.random.RandomState(seed)
    factor = random.standard_normal((dim, rank or dim))
    return Gaussian(random.standard_normal(dim), factor @ factor.T)


# --- moments and distances ------------------------------------------------------------------------


@pytest.mark.parametrize("dim, rank", [(1, None), (5, None), (64, None), (64, 20)])
def test_frechet_distance_is_its_definition(dim, rank):
    a, b = random_gaussian(0, dim, rank), random_gaussian(1, dim, rank)
    cross = sqrtm(a.covariance @ b.covariance).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4 if rank else 1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_frechet_distance_of_commuting_gaussians():
    """Diagonal covariances: the distance of means and of standard deviations."""
    a = Gaussian(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([3.0, 1.0]), np.diag([1.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 1) ** 2 + 3**2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.floats(-4, 4))
def test_frechet_distance_of_what_passes_as_covariances_is_not_negative(seed, dim, rank, scale):
    """Covariances of any rank, rounded to float32, against themselves and others."""
    a = random_gaussian(seed, dim, rank)
    rounded = Gaussian(a.mean, (10**scale * a.covariance).astype(np.float32).astype(np.float64))
    rounded.check()
    assert frechet_distance(rounded, rounded) >= 0
    assert frechet_distance(a, rounded) >= 0
    assert frechet_distance(rounded, a) >= 0


@pytest.mark.parametrize(
    "change, pattern",
    [
        (lambda c: -c, "it has the eigenvalue -"),
        (lambda c: c - 0.01 * np.trace(c) * np.eye(8), "it has the eigenvalue -"),
        (lambda c: np.triu(c), "it is not symmetric"),
        (lambda c: c + 0.01 * np.eye(8, k=1), "it is not symmetric, by 0.01"),
    ],
)
def test_what_is_no_covariance_is_refused(change, pattern):
    wrong = Gaussian(np.zeros(8), change(random_gaussian(0, 8, 4).covariance))
    with pytest.raises(ValueError, match=f"no covariance: {pattern}"):
        wrong.check()


def test_a_negative_frechet_distance_is_an_error():
    a = random_gaussian(0, 8)
    with pytest.raises(ValueError, match="a Frechet distance of -.*a covariance is not positive"):
        frechet_distance(a, Gaussian(a.mean, -a.covariance * 3))


def test_frechet_distance_of_samples_approaches_that_of_their_laws():
    """Means 2 apart, standard deviations 1 and 3 in each of 8 dimensions: 8 (2^2 + 2^2)."""
    random = np.random.RandomState(0)
    errors = []
    for n in (200, 20_000):
        a, b = random.standard_normal((n, 8)), 2 + 3 * random.standard_normal((n, 8))
        errors.append(abs(frechet_distance(Gaussian.fit(a), Gaussian.fit(b)) / 64 - 1))
    assert errors[1] < 0.02
    assert errors[1] < errors[0]


def test_moments():
    features = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    gaussian = Gaussian.fit(features)
    np.testing.assert_allclose(gaussian.mean, [1, 2])
    np.testing.assert_allclose(gaussian.covariance, [[4 / 3, 0], [0, 16 / 3]])
    assert Gaussian.fit(features[:, :1]).covariance.shape == (1, 1)
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        Gaussian.fit(features[:1])


# Means away from 0, since the relative error of one that happens to lie close to 0 has no bound.
@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.sampled_from([10.0, 1e6]))
def test_moments_of_blocks_are_those_of_all(sizes, offset):
    features = offset + np.random.RandomState(len(sizes)).standard_normal((sum(sizes), 3))
    gaussian = Gaussian.fit_blocks(np.split(features, np.cumsum(sizes)[:-1]))
    np.testing.assert_allclose(gaussian.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features.T), rtol=1e-8, atol=1e-8)


def test_inception_score_of_known_classifiers():
    assert inception_score(np.zeros((5, 10))) == pytest.approx(1)
    assert inception_score(1e3 * np.eye(10)) == pytest.approx(10)  # certain, and of every class
    logits = np.random.RandomState(0).standard_normal((50, 7))
    p = softmax(logits, axis=1)
    expected = np.exp(np.mean([entropy(row, p.mean(0)) for row in p]))
    assert inception_score(logits + 100) == pytest.approx(expected)


def test_kernel_distance_is_its_definition():
    random = np.random.RandomState(0)
    x, y = random.standard_normal((5, 4)), 1 + random.standard_normal((6, 4))

    def mean(a, b):
        same = a is b
        values = [
            (p @ q / 4 + 1) ** 3
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and i == j)
        ]
        return np.mean(values)

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert kernel_distance(x, y) == pytest.approx(expected)
    # blocks of at most 3: two, the longer one last
    parts = ((x[:2], y[:3]), (x[2:], y[3:]))
    blocks = [mean(a, a) + mean(b, b) - 2 * mean(a, b) for a, b in parts]
    assert kernel_distance(x, y, block=3) == pytest.approx(np.mean(blocks))
    with pytest.raises(ValueError, match="at least 6 samples, not 5"):
        kernel_distance(x, y, block=2)


def test_kernel_distance_has_no_bias():
    """The mean over many pairs of small samples of one law is zero."""
    random = np.random.RandomState(0)
    distances = [kernel_distance(*random.standard_normal((2, 5, 3))) for _ in range(4000)]
    assert abs(np.mean(distances)) < 4 * np.std(distances) / np.sqrt(len(distances))


def test_both_implementations_of_the_metrics_agree():
    pytest.importorskip("tensorflow_gan")
    tfgan = networks.tensorflow_gan()
    random = np.random.RandomState(0)
    real = random.gamma(0.5, size=(2100, 48)).astype(np.float32)
    fake = random.gamma(0.7, size=(1500, 48)).astype(np.float32) @ random.standard_normal((48, 48))
    logits = 3 * random.standard_normal((1500, 20))
    for values in (
        [b.frechet_distance(fake, Gaussian.fit(real), real) for b in (OURS, tfgan)],
        [b.kernel_distance(real, fake) for b in (OURS, tfgan)],
        [b.inception_score(logits) for b in (OURS, tfgan)],
    ):
        assert values[0] == pytest.approx(values[1], rel=1e-4)


# --- neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_nearest_neighbours(chunk, monkeypatch):
    monkeypatch.setattr("metrics.distances.CHUNK_NUMBERS", chunk)
    random = np.random.RandomState(0)
    queries, points = random.standard_normal((31, 5)), random.standard_normal((47, 5))
    distances, rows = nearest(queries, points, 3)
    expected, expected_rows = cKDTree(points).query(queries, 3)
    np.testing.assert_allclose(distances, expected)
    np.testing.assert_array_equal(rows, expected_rows)


def slow_share_within(queries, points, k):
    def inside(q):
        for i, p in enumerate(points):
            others = sorted(np.linalg.norm(p - o) for j, o in enumerate(points) if j != i)
            if np.linalg.norm(q - p) <= others[k - 1]:
                return True
        return False

    return np.mean([inside(q) for q in queries])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0, 3))
def test_precision_and_recall_are_their_definition(seed, k, shift):
    random = np.random.RandomState(seed)
    real, fake = random.standard_normal((15, 2)), shift + random.standard_normal((12, 2))
    precision, recall = precision_recall(real, fake, k)
    assert precision == slow_share_within(fake, real, k)
    assert recall == slow_share_within(real, fake, k)


def test_precision_and_recall_tell_quality_from_variety():
    random = np.random.RandomState(0)
    modes = np.concatenate(
        [random.standard_normal((200, 2)), 50 + random.standard_normal((200, 2))]
    )
    one_mode = random.standard_normal((300, 2))
    precision, recall = precision_recall(modes, one_mode)
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    assert precision_recall(modes, modes) == (1, 1)
    assert precision_recall(modes, modes + 1000) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 samples, not 3"):
        precision_recall(modes, modes[:3])


# --- samples against data -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [4, 10, 99])
def test_reference_knows_which_images_it_keeps(keep):
    features = np.random.RandomState(0).standard_normal((10, 3))
    reference = Reference.measure(np.split(features, [3, 7]), 10, keep)
    np.testing.assert_array_equal(reference.features, features[reference.index])
    assert len(set(reference.index)) == min(keep, 10)
    assert reference.complete == (keep >= 10)
    np.testing.assert_allclose(reference.gaussian.covariance, np.cov(features.T))


def test_few_samples_are_compared_with_much_data():
    """Blocks of the kernel distance keep two samples each."""
    random = np.random.RandomState(0)
    real = random.standard_normal((3000, 2))
    few = random.standard_normal((4, 2))
    scores = compare(Comparison(few, None, Reference.measure([real], 3000, 3000)))
    scores = {key: v for key, v in scores.items() if not key.endswith(("_remark", "_low", "_high"))}
    assert scores.keys() == {"fid", "kid", "precision", "recall", "nearest", "nearest_data"}
    assert all(np.isfinite(list(scores.values())))


def test_moments_alone_give_a_frechet_distance():
    random = np.random.RandomState(0)
    a, b = random.standard_normal((2, 50, 4))
    scores = compare(Comparison(a, None, Reference(Gaussian.fit(b))))
    assert scores.keys() == {"fid", "fid_low", "fid_high"}
    assert scores["fid"] == frechet_distance(Gaussian.fit(a), Gaussian.fit(b))


def test_what_two_metrics_share_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        distances, "precision_recall", lambda *_, **__: calls.append(1) or (0.25, 0.75)
    )
    a, b = np.random.RandomState(0).standard_normal((2, 50, 4))
    scores = compare(Comparison(a, None, Reference.measure([b], 50, 50)))
    assert (scores["precision"], scores["recall"]) == (0.25, 0.75)
    assert len(calls) == 1


def test_labels_name_the_feature_space():
    assert METRICS["fid"].label_in("pixels") == "Fréchet distance, pixels"
    assert METRICS["fid"].label_in("torchscript") == "FID"
    assert METRICS["kid"].label_in("") == "Kernel distance"
    assert METRICS["recall"].label_in("pixels") == "Recall"


# --- feature spaces -------------------------------------------------------------------------------


def space_of(kind, path="", channels=3, size=8):
    return get_space(kind, str(path), EightBitImages((channels, size, size)), CPU)


class MeanColour(torch.nn.Module):
    """Features are the mean of each channel, logits their doubles."""

    def forward(self, x):
        features = x.float().mean((2, 3), keepdim=True)
        return features, 2 * features.flatten(1)


class OnlyFeatures(torch.nn.Module):
    def forward(self, x):
        return x.float().flatten(1)[:, :5]


class AsPublished(torch.nn.Module):
    """The interface of the Inception graph that NVIDIA published as TorchScript."""

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        features = x.float().mean((2, 3)) / 255
        if return_features:
            return features
        return (features + (0.0 if no_output_bias else 9.0)).softmax(1)


def save_torchscript(path, module):
    torch.jit.script(module).save(str(path))
    return path


def random_images(channels=3, n=7, size=8):
    shape = (n, size, size, channels)
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def test_pixels():
    space = space_of("pixels", channels=1, size=2)
    images = np.zeros((3, 2, 2, 1), dtype=np.uint8)
    images[1] = 255
    features, logits = space(images)
    assert features.tolist() == [[0] * 4, [1] * 4, [0] * 4]
    assert logits is None
    assert (space.name, space.width) == ("pixels", 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchscript(channels, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "EXTRACTED_AT_ONCE", 3)  # 7 images: the last part is smaller
    path = save_torchscript(tmp_path / "network.pt", MeanColour())
    space = space_of("torchscript", path, channels)
    images = random_images(channels)
    pool_3, logits = space(images)
    expected = np.broadcast_to(images.mean((1, 2)), (7, 3))  # grey is repeated
    np.testing.assert_allclose(pool_3, expected, rtol=1e-6)
    np.testing.assert_allclose(logits, 2 * expected, rtol=1e-6)
    assert (pool_3.dtype, space.width) == (np.float32, 3)


def test_torchscript_without_logits(tmp_path):
    path = save_torchscript(tmp_path / "network.pt", OnlyFeatures())
    features, logits = space_of("torchscript", path)(random_images())
    assert features.shape == (7, 5)
    assert logits is None


def test_torchscript_with_the_published_interface(tmp_path):
    path = save_torchscript(tmp_path / "network.pt", AsPublished())
    images = random_images()
    features, logits = space_of("torchscript", path)(images)
    np.testing.assert_allclose(features, images.mean((1, 2)) / 255, rtol=1e-6)
    np.testing.assert_allclose(softmax(logits, 1), softmax(features, 1), rtol=1e-5)
    assert inception_score(logits) == pytest.approx(inception_score(features), rel=1e-5)


def test_the_name_tells_weights_apart(tmp_path):
    names = set()
    for scale in (1.0, 2.0):
        module = torch.jit.trace(
            torch.nn.Linear(8, 2).requires_grad_(False), torch.ones(1, 3, 8, 8)
        )
        with torch.no_grad():
            module.weight.fill_(scale)
        module.save(str(tmp_path / "network.pt"))
        names.add(networks.network(str(tmp_path / "network.pt"), CPU)[0])
    assert len(names) == 2


def save_inception(folder):
    """A SavedModel whose pool_3 are three pixels of its input, and whose logits their doubles."""
    tf = pytest.importorskip("tensorflow")

    class Network(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 299, 299, 3], tf.float32)])
        def __call__(self, x):
            pool_3 = tf.stack([x[:, 0, 0, 0], x[:, 150, 150, 1], x[:, 298, 298, 2]], 1)
            return {"pool_3": pool_3[:, None, None], "logits": 2 * pool_3}

    tf.saved_model.save(Network(), str(folder))
    return folder


def old_bilinear(image, row, column, size=299):
    """TensorFlow 1's resizing at one place: corners are aligned at the top left, no half pixels."""
    y, x = row * len(image) / size, column * len(image) / size
    rows, columns = ([int(v), min(int(v) + 1, len(image) - 1)] for v in (y, x))
    square = image[np.ix_(rows, columns)]
    return np.array([1 - y % 1, y % 1]) @ square @ np.array([1 - x % 1, x % 1])


@pytest.mark.parametrize("channels", [1, 3])
def test_inception(channels, tmp_path):
    space = space_of("inception", save_inception(tmp_path / "net"), channels)
    images = random_images(channels)
    features, logits = space(images)
    scaled = np.broadcast_to(images / 127.5 - 1, (7, 8, 8, 3))
    expected = [
        [old_bilinear(image[..., c], at, at) for c, at in enumerate((0, 150, 298))]
        for image in scaled
    ]
    np.testing.assert_allclose(features, expected, atol=1e-5)
    np.testing.assert_allclose(logits, 2 * features)
    assert space.width == 3


def test_inception_is_found_where_tfhub_keeps_it(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    name = hashlib.sha1(networks.INCEPTION_URL.encode()).hexdigest()
    save_inception(tmp_path / name)
    assert space_of("inception").width == 3


def test_inception_that_cannot_be_fetched_is_told_soon(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_gan")
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(networks, "FETCH_SECONDS", 0.5)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/inception"
        monkeypatch.setattr(networks, "INCEPTION_URL", address)
        start = time.monotonic()
        with pytest.raises(ValueError, match="cannot be fetched.*eval.inception_path.*network"):
            space_of("inception")
        assert time.monotonic() - start < 5
    with pytest.raises(ValueError, match="cannot be fetched"):  # nobody listens
        space_of("inception")
    assert list(tmp_path.iterdir()) == []


def test_without_tensorflow_the_way_is_named(monkeypatch):
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs tensorflow, .*'network' does without"):
        space_of("inception")


@pytest.mark.parametrize(
    "features, make, pattern",
    [
        ("pixel", None, "eval.features must be one of .*'pixels', not 'pixel'"),
        ("inception", "folder", "no SavedModel: no saved_model.pb"),
        ("torchscript", None, "needs a file: eval.inception_path=''"),
        ("torchscript", "text", "is not a TorchScript module"),
        ("torchscript", "linear", r"does not take images of shape \(8, 8, 3\)"),
        ("pixels", "wide", "49,152 features of each image, a covariance of 18 GiB"),
    ],
)
def test_feature_spaces_that_cannot_be_used_are_one_line(features, make, pattern, tmp_path):
    path, size = "", 8
    if make == "folder":
        pytest.importorskip("tensorflow_gan")
        path = tmp_path
    if make == "text":
        path = tmp_path / "network.pt"
        path.write_text("no network")
    if make == "linear":
        path = save_torchscript(tmp_path / "network.pt", torch.nn.Linear(3, 2))
    if make == "wide":
        size = 128
    with pytest.raises(ValueError, match=pattern) as caught:
        space_of(features, path, size=size)
    assert "\n" not in str(caught.value)
