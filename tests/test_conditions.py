"""Conditions beside class labels: a named class drops none of them, and no image loses its own."""

import numpy as np
import pytest
import torch
from torch import nn

import datasets
import evaluation
import experiment
import models
import sources
from configs.edm import digits_ddpmpp
from library.evaluated import Evaluated, Split
from library.evaluated_restorations import restore_images
from library.restoration import Options, ToRestore
from library.trained import Trained
from reports.drawings import draw_classes
from sources.base import Classes
from sources.batch import KINDS, Kind

NUMBER = {"train": 12, "test": 6}


class Labelled:
    """Images, each with a class and a vector, of which the first entry is the image's number."""

    def __init__(self, split: str):
        self.numbers = np.arange(NUMBER[split])
        self.start = 100.0 if split == "test" else 0.0

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return np.full((4, 4, 1), 10 * i, np.uint8)

    def classes(self):
        return Classes(self.numbers % 3, ("a", "b", "c"))

    def conditions(self):
        numbers = self.start + 1 + self.numbers
        return {"vector": np.stack([numbers, numbers], 1).astype(np.float32)}


class Looking(nn.Module):
    """A network that records the conditions of every call."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(())), []

    def forward(self, x, noise_label, **conditions):
        self.calls.append(conditions)
        return self.weight * x


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "labelled", lambda data, split: Labelled(split))
    monkeypatch.setitem(models.NETWORKS, "looking", lambda *_: Looking())
    config = digits_ddpmpp.get_config()
    config.data.update(dataset="labelled", conditions="vector", num_classes=3, image_size=4)
    config.model.name = "looking"
    config.training.label_dropout = 0.0
    config.sampling.update(N=2, class_label=1)
    config.device = "cpu"
    return config


def built(config):
    run = experiment.Experiment.build(config)
    run.network.requires_grad_(False)
    return run


def vectors_of(run, split):
    return run.data.conditions(split, labels=False)["vector"]


def test_a_named_class_is_drawn_beside_the_other_conditions(config):
    run = built(config)
    conditions = run.draw_conditions(20, "samples", 0)
    assert conditions["class_labels"].tolist() == [1] * 20
    training_rows = {tuple(row) for row in vectors_of(run, "train").tolist()}
    assert {tuple(row) for row in conditions["vector"].tolist()} <= training_rows
    assert len(conditions["vector"].unique()) > 3
    vector = conditions["vector"][:2]
    run.sampler(run.network, 2, generator=torch.Generator(), conditions={"vector": vector})
    for call in run.network.calls:
        assert call["class_labels"].tolist() == [1, 1]
        assert torch.equal(call["vector"], vector)


def test_a_named_class_alone_reads_no_data(config, monkeypatch):
    config.data.conditions = ""
    run = built(config)
    monkeypatch.setattr(datasets.Data, "conditions", None)
    conditions = run.draw_conditions(3, "samples", 0)
    assert list(conditions) == ["class_labels"] and conditions["class_labels"].tolist() == [1, 1, 1]


def evaluated(run, folder):
    return Evaluated(experiment=run, folder=folder, k=1, origin={}, seed=0, batch_size=6)


def test_classification_is_of_images_with_their_other_conditions(config, tmp_path):
    run = built(config)
    calls = []

    def likelihood(net, x, generator, conditions, watch=None):
        calls.append(conditions)
        return (torch.zeros(len(x)),)

    likelihood.divergence = "exact"
    run.likelihood = likelihood
    data = run.data.get("test")
    evaluation.classification(evaluated(run, tmp_path), Split("test", data))
    assert [call["class_labels"][0].item() for call in calls] == [0, 1, 2]
    assert all(torch.equal(call["vector"], vectors_of(run, "test")) for call in calls)


def restored_of(run, path=""):
    options = Options("denoise", path, not path, noise=0.1, number=2)
    return ToRestore.read(options, run)


@pytest.mark.parametrize("class_label", [1, -1])
def test_restored_images_keep_their_conditions(config, tmp_path, class_label):
    config.sampling.class_label = class_label
    run = built(config)
    restored, vector = restored_of(run), vectors_of(run, "test")[:2]
    assert torch.equal(restored.conditions["vector"], vector)
    assert restored.labels.tolist() == ([1, 1] if class_label == 1 else [0, 1])
    restore_images(evaluated(run, tmp_path), restored)
    vectors = torch.cat([call["vector"] for call in run.network.calls])
    assert {row[0] for row in vectors.tolist()} == {101.0, 102.0}


def test_images_of_files_are_restored_without_conditions_or_not_at_all(config, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4, 1), np.uint8))
    path = str(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"conditions \(vector\).*not trained without") as error:
        restored_of(built(config), path)
    assert "\n" not in str(error.value)
    config.training.label_dropout = 0.1
    conditions = restored_of(built(config), path).conditions
    assert conditions["vector"].tolist() == [[0, 0], [0, 0]]
    assert conditions["class_labels"].tolist() == [1, 1]


CALLS = {
    "encode": lambda run, x, **more: run.encode(x, **more),
    "decode": lambda run, x, **more: run.decode(x, **more),
    "log_likelihood": lambda run, x, **more: run.log_likelihood(x, **more),
    "bits_per_dim": lambda run, x, **more: run.bits_per_dim(x, **more),
    "denoise": lambda run, x, **more: run.denoise(x, 0.3, **more),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_library_gives_the_network_all_conditions_or_refuses(config, tmp_path, name):
    run = Trained(built(config), tmp_path, 0)
    x, vector = torch.full((2, 1, 4, 4), 0.5), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match="the network takes vector of each image"):
        CALLS[name](run, x)
    for wrong in ({"vector": vector[:1]}, {"image": x}):
        with pytest.raises(ValueError, match="must be 2 rows of each of vector"):
            CALLS[name](run, x, conditions=wrong)
    CALLS[name](run, x, conditions={"vector": vector})
    assert run.experiment.network.calls
    for call in run.experiment.network.calls:
        assert torch.equal(call["vector"], vector) and call["class_labels"].tolist() == [1, 1]


def test_samples_take_conditions_or_those_of_training_images(config, tmp_path):
    run, vector = Trained(built(config), tmp_path, 0), torch.tensor([[1.5, 2.5], [3.5, 4.5]])
    run.sample([0, 1], conditions={"vector": vector})
    calls = run.experiment.network.calls
    vectors = torch.cat([call["vector"] for call in calls]).unique(dim=0)
    assert torch.equal(vectors, vector)
    calls.clear()
    run.sample([0, 1])
    assert {row[0] for call in calls for row in call["vector"].tolist()} <= {*range(1, 13)}


def test_rows_of_classes_differ_in_their_class_alone(config, tmp_path):
    config.sampling.class_label = -1
    run = built(config)
    draw_classes(run, 0, tmp_path / "classes.png")
    (call, *_) = run.network.calls
    assert call["class_labels"].unique().tolist() == [0, 1, 2]
    assert len(call["vector"]) == len(call["class_labels"])
    assert len(call["vector"].unique(dim=0)) == 1


def test_a_condition_of_an_unknown_kind_is_refused_before_training(config, monkeypatch):
    monkeypatch.setattr(Labelled, "conditions", lambda self: {"depth": np.zeros((len(self), 1))})
    config.data.conditions = "depth"
    for read in (datasets.Data(config.data).get, datasets.Data(config.data).conditions):
        with pytest.raises(
            ValueError, match=r"depth is no kind of condition; known: .*vector"
        ) as e:
            read("train")
        assert "\n" not in str(e.value)
    monkeypatch.setitem(KINDS, "depth", Kind(none=0))
    assert datasets.Data(config.data).conditions("train")["depth"].shape == (12, 1)
