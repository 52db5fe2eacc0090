"""Identities of codecs and objectives, which tell their results apart: caches, guides, reports."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_configs import load
from torch import nn

import completion
import evaluation
import experiment
from completion import complete
from configs.keys import flatten
from configs.schema import Key, Number, whole
from experiment import Experiment
from library.evaluated import Evaluated, Split
from losses import OBJECTIVES, Regression
from reports import settings
from reports.compare import compare_page
from reports.runs import Run
from sources import codec
from sources.codec import EightBitImages
from sources.codec import from_config as get_codec
from storage.digests import digest


class Mirrored(nn.Module):
    """A codec with a weight, drawn from `data.codec_seed`, which its words as a module lack."""

    keys = {"data.codec_seed": Key(0, whole(0, 99), "Mirrored: of its weights")}
    bounds, levels, log_volume = (-torch.inf, torch.inf), 256, 0.0

    def __init__(self, shape, seed):
        super().__init__()
        self.shape = self.data_shape = shape
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("signs", torch.randn(shape, generator=generator).sign())

    @classmethod
    def from_config(cls, config):
        return cls(EightBitImages.from_config(config).data_shape, config.data.codec_seed)

    @property
    def identity(self):
        return f"Mirrored {digest(self.state_dict())}"

    def encode(self, data):
        return self.signs * (2 * data - 1)


@dataclass(frozen=True)
class Scaled(EightBitImages):
    scale: float = 0.5
    keys = {"data.factor": Key(0.5, Number(1e-3, 1e3), "Scaled: x is from -factor to factor")}

    @classmethod
    def from_config(cls, config):
        return cls(EightBitImages.from_config(config).data_shape, scale=config.data.factor)

    def encode(self, data):
        return self.scale * super().encode(data)


@pytest.fixture
def codecs(monkeypatch):
    monkeypatch.setitem(codec.CODECS, "mirrored", Mirrored)
    monkeypatch.setitem(codec.CODECS, "scaled", Scaled)


def tiny(**changes):
    """A config of the digits with `changes`, __ in place of the dot."""
    config = load("vp/digits_ddpmpp.py")
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    small = {"model.nf": 8, "model.ch_mult": (1,), "model.attn_resolutions": ()}
    config.update_from_flattened_dict(small | changes)
    return config


def test_codecs_of_other_weights_are_others(codecs):
    origins = [
        Experiment.build(tiny(data__codec="mirrored", data__codec_seed=seed)).origin()["codec"]
        for seed in (0, 0, 1)
    ]
    assert origins[0] == origins[1] != origins[2]
    assert "codec" not in Experiment.build(tiny()).origin()  # so that existing caches stay valid
    scaled = Experiment.build(tiny(data__codec="scaled")).origin()["codec"]
    assert scaled == "Scaled(data_shape=(1, 8, 8), centered=True, scale=0.5)"


def test_a_codec_without_an_identity_is_one_line(codecs, monkeypatch):
    monkeypatch.setattr(Mirrored, "identity", None)
    with pytest.raises(ValueError, match="Mirrored has no `identity`"):
        Experiment.build(tiny(data__codec="mirrored"))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"data__codec": ""}, "scale=0.5)', not EightBitImages(data_shape=(1, 8, 8), centered=T"),
        ({"data__factor": 2.0}, "scale=0.5)', not Scaled(data_shape=(1, 8, 8), centered=True, sca"),
        ({"data__conditions": "place"}, "its data.conditions is , not place"),
    ],
)
def test_a_guide_has_codec_and_conditions(codecs, tmp_path, monkeypatch, changes, reason):
    guide_config, path = tiny(data__codec="scaled"), tmp_path / "guide.pth"
    content = {"config": flatten(guide_config)}
    monkeypatch.setattr(experiment, "open_checkpoint", lambda path, intact: content)
    monkeypatch.setattr(experiment, "load_ema", lambda network, content: None)
    config = tiny(**{"data__codec": "scaled", "sampling__guide": str(path), **changes})
    arguments = config, get_codec(config), torch.device("cpu")
    if reason is None:
        assert isinstance(experiment._guide(*arguments), nn.Module)
        return
    with pytest.raises(ValueError) as caught:
        experiment._guide(*arguments)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, reused",
    [({}, True), ({"data__factor": 2.0}, False), ({"data__codec": ""}, False)],
)
def test_what_is_measured_is_of_one_codec(codecs, tmp_path, monkeypatch, changes, reused):
    """M of a run holds for its codec alone: another is measured anew."""
    open_keys = {"training__sde": "poisson", "sampling__z_max": 5.0, "sampling__upper_norm": 9.0}
    stored = tiny(data__codec="scaled", training__M=77, **open_keys)
    checkpoint_and_config = [Path("checkpoint_2.pth"), stored]
    monkeypatch.setattr(completion.run_config, "find", lambda workdir: checkpoint_and_config)
    monkeypatch.setattr(completion, "mean_norm", lambda data, encode: 100.0)
    config = tiny(**{"data__codec": "scaled", "training__M": None, **open_keys, **changes})
    completed, *_ = complete(config, tmp_path)
    assert (completed.training.M == 77) is reused


class Huber(Regression):
    keys = {"training.huber": Key(0.03, Number(1e-6, 1e3), "c")}
    options = Regression.options | {"c": "training.huber"}

    def __init__(self, method, *, c, **numbers):
        super().__init__(method, **numbers)
        self.c = c


@pytest.fixture
def huber(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "huber", Huber)


def report(value, **changes):
    """A report with the settings of a run of the config `changes`; without any, of an older one."""
    made_by = settings.BEFORE | Experiment.build(tiny(**changes)).parts
    whole_of = {"method": "VPSDE", "eval.dataset": "test", "split.digest": "cd"}
    values = {"bpd": value, "loss": value, "accuracy": value}
    return values | {"settings": settings.to_json(whole_of | (made_by if changes else {}))}


HAS = {"data__random_flip": False}  # a value that no ranking needs


@pytest.mark.parametrize(
    "changes, bpd, loss",
    [
        ({}, "", ""),
        (HAS, "", ""),
        ({"data__codec": "scaled"}, "data.codec", "data.codec"),
        ({"training__objective": "huber"}, "", "training.objective"),
        ({"data__conditions": "place"}, "", "data.conditions"),
    ],
)
def test_values_of_other_codecs_and_objectives_are_not_ranked(codecs, huber, changes, bpd, loss):
    """Such values rank neither with those of pixels and regression nor with older reports."""
    other = report(2.0, **changes)
    for plain in (report(1.0), report(1.0, **HAS)):
        for key, name in (("bpd", bpd), ("loss", loss)):
            reason = settings.obstacle(key, [plain, other])
            assert reason.startswith(f"{name} differs (") if name else reason == ""


def test_options_of_codec_and_objective_are_settings(codecs, huber):
    one, two = (report(1.0, training__objective="huber", training__huber=c) for c in (0.1, 0.2))
    assert settings.obstacle("loss", [one, two]) == ("training.objective.huber differs (0.1; 0.2)")
    assert settings.obstacle("bpd", [one, two]) == ""
    one, two = (report(1.0, data__codec="mirrored", data__codec_seed=s) for s in (0, 1))
    assert settings.obstacle("bpd", [one, two]).startswith("data.codec differs (Mirrored ")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"data.num_workers": 1, "data.changed": "allow"}, None),
        ({"data.digest": "names", "data.resident_bytes": 0}, None),
        ({"data.codec": "scaled"}, "data.codec"),
        ({"data.factor": 2.0}, "data.factor"),
        ({"training.objective": "huber"}, "training.objective"),
        ({"training.huber": 2.0}, "training.huber"),
        ({"data.path": "b"}, "data.path"),
        ({"data.centered": False}, "data.centered"),
    ],
)
def test_a_page_says_which_losses_are_of_another_kind(codecs, huber, changes, named):
    curves = {"loss/train": [(1, 1.0), (2, 0.5)]}
    values = flatten(tiny())
    runs = [Run("a", values, curves, {}, None), Run("b", values | changes, curves, {}, None)]
    words = re.findall("Losses of another (.*?) are of another kind", compare_page(runs))
    assert words == [named] * bool(named)


def evaluated_loss(folder, **changes):
    """The loss of an untrained network over the test digits, and whether it was computed."""
    run = Experiment.build(tiny(data__dataset="digits", **changes))
    calls, loss = [], run.objective.loss
    run.objective.loss = lambda *arguments: calls.append(1) or loss(*arguments)
    evaluated = Evaluated(
        experiment=run, folder=folder, k=1, origin=run.origin(), seed=0, batch_size=100
    )
    split = Split("test", run.data.get("test"))
    return evaluation.loss(evaluated, split, 200)["loss"], bool(calls)


def test_a_loss_is_computed_again_only_where_it_would_be_another(huber, tmp_path):
    value, computed = evaluated_loss(tmp_path)
    assert computed
    unrelated = {"training__n_iters": 7, "training__snapshot_freq": 3, "training__huber": 1.0}
    assert evaluated_loss(tmp_path, **unrelated, training__label_dropout=0.5) == (value, False)
    assert evaluated_loss(tmp_path, training__reduce_mean=False)[1]
    huber = {"training__objective": "huber"}
    assert evaluated_loss(tmp_path, **huber, training__huber=0.1)[1]
    assert evaluated_loss(tmp_path, **huber, training__huber=0.2)[1]
    assert not evaluated_loss(tmp_path, **huber, training__huber=0.2)[1]


def test_a_loss_is_that_of_the_learned_weights(monkeypatch, tmp_path):
    """A loss belongs to the objective's weights: with another training's it is computed anew."""

    class Learned(Regression):
        def __init__(self, method, **numbers):
            super().__init__(method, **numbers)
            self.offset = nn.Parameter(torch.tensor(self.start))

        def loss(self, net, examples, reference):
            return super().loss(net, examples, reference) + self.offset

    monkeypatch.setitem(OBJECTIVES, "learned", Learned)
    results = []
    for Learned.start in (0.0, 0.0, 1e4):
        results.append(evaluated_loss(tmp_path, training__objective="learned"))
    assert [computed for _, computed in results] == [True, False, True]
    assert results[0][0] == results[1][0] != results[2][0]
