"""EDM's augmentation: transformations by another definition, labels, laws of parameters."""

import math
from dataclasses import fields

import pytest
import torch
from conftest import objective_of

import methods
from configs.edm import digits_ddpmpp as edm_digits
from configs.poisson import digits_ddpmpp as poisson_digits
from models import create_model
from sources.augmentation import augment, draw_parameters, labels_of, transform
from sources.batch import Batch
from sources.codec import from_config as get_codec
from sources.preparation import Preparation, mirrored


def parameters(**values):
    """One row: a0=1.0 and so on, 0 for the others."""
    row = torch.zeros(1, 8, dtype=torch.float64)
    for name, value in values.items():
        row[0, int(name[1:])] = value
    return row


IMAGE = torch.rand(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def shifted(x, columns):
    """`x` moved right, reflected at its edge pixels."""
    index = (torch.arange(8) - columns).abs()
    return x[..., torch.where(index > 7, 14 - index, index)]


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"a0": 1}, IMAGE.flip(-1)),
        ({"a1": 1}, IMAGE.flip(-2)),
        ({"a0": 1, "a1": 1}, IMAGE.flip(-1, -2)),
        ({"a3": math.pi / 2}, IMAGE.rot90(1, (-2, -1))),  # a quarter turn to the left
        ({"a3": -math.pi / 2}, IMAGE.rot90(-1, (-2, -1))),
        ({"a3": math.pi}, IMAGE.flip(-1, -2)),
        ({"a6": 1}, shifted(IMAGE, 1)),  # an eighth of the width
        ({"a6": -3}, shifted(IMAGE, -3)),
        ({"a7": 2}, shifted(IMAGE.mT, 2).mT),
        ({"a0": 1, "a3": math.pi / 2}, IMAGE.flip(-1).rot90(1, (-2, -1))),  # first the mirror
        ({"a3": math.pi / 2, "a6": 2}, shifted(IMAGE.rot90(1, (-2, -1)), 2)),  # last the shift
    ],
)
def test_transformations_that_move_whole_pixels_are_exact(values, expected):
    image = transform(IMAGE, parameters(**values))
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-10)


def wave(x, y):
    """A smooth image of the position (right, down) from the centre."""
    return torch.cos(2 * math.pi * (x / 20 + y / 27) + 0.3)


@pytest.mark.parametrize(
    "values, source",
    [
        ({"a2": 2.0}, lambda x, y: (x / 2**0.4, y / 2**0.4)),  # enlarged
        ({"a2": -1.0}, lambda x, y: (x * 2**0.2, y * 2**0.2)),
        ({"a5": 1.5}, lambda x, y: (x / 2**0.3, y * 2**0.3)),
        ({"a4": math.pi / 2, "a5": 1.5}, lambda x, y: (x * 2**0.3, y / 2**0.3)),
        (  # along the diagonal right and down: (x + y) / 2 is stretched, (x - y) / 2 shrunk
            {"a4": math.pi / 4, "a5": 5.0},
            lambda x, y: ((x + y) / 4 + (x - y), (x + y) / 4 - (x - y)),
        ),
        ({"a3": math.pi / 6}, lambda x, y: (x * 0.75**0.5 - y / 2, x / 2 + y * 0.75**0.5)),
        ({"a6": 0.5, "a7": -0.3}, lambda x, y: (x - 2.0, y + 1.2)),
        ({"a2": 2.0, "a6": 0.5}, lambda x, y: ((x - 2) / 2**0.4, y / 2**0.4)),
    ],
)
def test_transformations_follow_their_formula(values, source):
    """y(p) = x(G^-1 p), away from the edges of a smooth image."""
    centred = torch.arange(32, dtype=torch.float64) - 15.5
    x, y = torch.meshgrid(centred, centred, indexing="xy")
    image = transform(wave(x, y)[None, None], parameters(**values))[0, 0]
    expected = wave(*source(x, y))
    inner = x.hypot(y) < 7
    assert (image - expected)[inner].abs().max() < 0.015  # bilinear between half pixels
    assert (wave(x, y) - expected)[inner].abs().max() > 0.2


def test_labels_are_those_of_the_paper():
    a = torch.tensor([[1.0, 1.0, 0.5, 0.6, 0.7, 0.8, 0.9, -0.4]])
    expected = [1, 1, 0.5, math.cos(0.6) - 1, math.sin(0.6)]
    expected += [0.8 * math.cos(0.7), 0.8 * math.sin(0.7), 0.9, -0.4]
    torch.testing.assert_close(labels_of(a)[0], torch.tensor(expected))
    assert not labels_of(torch.zeros(2, 8)).any()


def test_the_laws_of_the_parameters():
    """Bernoulli, normal and uniform, each group with its probability and by itself."""
    n, p = 40_000, 0.12
    a = draw_parameters(n, p, torch.Generator().manual_seed(0)).double()
    assert torch.equal(a, draw_parameters(n, p, torch.Generator().manual_seed(0)).double())
    assert set(a[:, :2].flatten().tolist()) == {0.0, 1.0}
    shares = torch.tensor([0.5, p / 2, *[p] * 6], dtype=torch.float64)
    error = (shares * (1 - shares) / n).sqrt()
    assert (((a != 0).double().mean(0) - shares).abs() < 4 * error).all()
    assert ((a[:, 4] != 0) == (a[:, 5] != 0)).all() and ((a[:, 6] != 0) == (a[:, 7] != 0)).all()
    groups = (a[:, 1:7:2] != 0).double()  # mirrored down, rotated, stretched: independent
    correlation = torch.corrcoef(torch.cat([groups, (a[:, [2, 6]] != 0)], 1).T)
    assert (correlation - torch.eye(5)).abs().max() < 4 / n**0.5
    for column in (2, 5, 6, 7):
        values = a[a[:, column] != 0, column]
        assert abs(values.mean()) < 4 / len(values) ** 0.5
        assert abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5
    for column in (3, 4):
        values = a[a[:, column] != 0, column] / math.pi
        assert values.abs().max() <= 1
        assert abs(values.mean()) < 4 / (3 * len(values)) ** 0.5
        assert abs(values.square().mean() - 1 / 3) < 4 * (4 / 45 / len(values)) ** 0.5


def test_images_that_are_not_transformed_stay_bit_for_bit():
    images = torch.rand(256, 1, 8, 8)
    batch = augment(Batch(images), 0.12, False, torch.Generator().manual_seed(1))
    same = ~batch.conditions["augment_labels"].any(1)
    assert 30 < same.sum() < 110  # 0.5 * 0.88^4 * 0.94 of 256: 72
    assert torch.equal(batch.images[same], images[same])
    assert not (batch.images == images).flatten(1).all(1)[~same].any()


def test_one_transformation_of_a_reference_batch():
    images = torch.rand(1, 1, 8, 8).expand(16, -1, -1, -1)
    batch = augment(Batch(images), 1.0, True, torch.Generator().manual_seed(1))
    labels = batch.conditions["augment_labels"]
    assert labels.shape == (16, 9) and labels[0, 2:].all()
    assert (labels == labels[0]).all()
    assert (batch.images == batch.images[0]).all() and not torch.equal(batch.images, images)


def prepared(config, images, seed=0):
    shared = methods.get_method(config).uses_reference_batch
    prepare = Preparation.from_config(config, get_codec(config), shared)
    return prepare(Batch(images), torch.Generator().manual_seed(seed))


def test_without_augmentation_nothing_is_drawn():
    config = edm_digits.get_config()
    config.data.random_flip = True
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    expected = 2 * (mirrored(images, generator) / 255) - 1
    batch = prepared(config, images)
    assert torch.equal(batch.images, expected) and "augment_labels" not in batch.conditions


class Watched(torch.nn.Module):
    """A network that records the augmentation labels of its calls."""

    def forward(self, x, noise_label, augment_labels=None):
        self.labels = augment_labels
        return x


def test_labels_reach_the_network_with_their_examples():
    config = edm_digits.get_config()
    config.training.augment, config.model.augment_dim = 0.5, 9
    batch = prepared(config, torch.randint(256, (96, 1, 8, 8), dtype=torch.uint8))
    loss = objective_of(config)
    examples = loss.draw(batch, 0, torch.Generator().manual_seed(0))
    net = Watched()
    loss.loss(net, examples.shard(1, 4), batch)
    assert torch.equal(net.labels, batch.conditions["augment_labels"][24:48]) and net.labels.any()
    # in training their embedding has a gradient
    model = create_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss.loss(model, examples, batch).backward()
    assert model.augment_embedding.weight.grad.abs().max() > 0
    assert {f.name for f in fields(Batch)} == {"images", "conditions"}


def test_no_image_is_mirrored_without_a_word_to_the_network():
    config = edm_digits.get_config()
    config.data.random_flip = True
    config.training.augment, config.model.augment_dim = 1e-9, 9
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    batch = prepared(config, images)
    mirrored, scaled = batch.conditions["augment_labels"][:, 0] == 1, images / 127.5 - 1
    assert 20 < mirrored.sum() < 44
    torch.testing.assert_close(batch.images[mirrored], scaled[mirrored].flip(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.images[~mirrored], scaled[~mirrored], rtol=0, atol=1e-5)


def test_charges_of_a_poisson_flow_are_transformed_as_its_examples():
    config = poisson_digits.get_config()
    config.training.update(augment=1.0, batch_size=32, small_batch_size=8)
    config.model.augment_dim = 9
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
    batch = prepared(config, images, seed=3)
    a = draw_parameters(1, 1.0, torch.Generator().manual_seed(3)).expand(32, -1)
    expected = transform(images / 127.5 - 1, a)
    torch.testing.assert_close(batch.images, expected, rtol=0, atol=1e-5)
    labels = batch.conditions["augment_labels"]
    assert torch.equal(labels, labels_of(a))
    examples = objective_of(config).draw(batch)
    assert torch.equal(examples.conditions["augment_labels"], labels[:8])


def test_a_network_without_the_labels_is_refused():
    config = edm_digits.get_config()
    config.training.augment = 0.12
    with pytest.raises(ValueError, match=r"augment=0\.12 needs model\.augment_dim=9, .* not 0"):
        Preparation.from_config(config, get_codec(config), False)
