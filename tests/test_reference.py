"""Reference statistics: data that are refused, several spaces beside each other, their cost."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import write_tree
from test_compare import report
from test_identity import config_of, grey
from test_metrics import MeanColour, save_torchscript
from test_spaces import BOTH

import datasets
import distributed
from datasets import DataChanged
from library.evaluated_restorations import plain_restoration
from metrics.features import FEATURES, get_spaces, pixels
from metrics.reference import ReferenceStatistics, fingerprint
from reports.settings import obstacle
from sources import digests
from sources.codec import EightBitImages
from sources.codec import from_config as get_codec

CPU = torch.device("cpu")


def evaluation_of(tmp_path, **evaluate):
    """A config of grey images in `tmp_path`/images, with pixels as features."""
    config = config_of(tmp_path / "images")
    config.eval.update(features="pixels", num_samples=30, stats_dir=str(tmp_path / "stats"))
    config.eval.update(evaluate)
    write_tree(tmp_path / "images", grey(10), "{i:03d}.png")
    (tmp_path / "stats").mkdir()
    return config


def publish(tmp_path, width=16, name="folder_stats", **entries):
    mu, sigma = np.ones(width), np.eye(width)
    np.savez(tmp_path / f"stats/{name}.npz", mu=mu, sigma=sigma, **entries)


def statistics_of(config, stored=None):
    data = datasets.Data(config.data, stored)
    return ReferenceStatistics.from_config(config, CPU, data, get_codec(config))


def test_changed_data_are_refused_beside_published_statistics(tmp_path):
    config = evaluation_of(tmp_path)
    publish(tmp_path, data="0123")
    stored = datasets.Data(config.data).identity
    write_tree(tmp_path / "images", grey(20), "{i:03d}.png")
    with pytest.raises(DataChanged, match="not those of the run.*restore them"):
        statistics_of(config, stored)


def test_processes_do_as_the_main_one_whose_data_are_changed_or_not_there(tmp_path, monkeypatch):
    """Another process opens no data for published statistics, and raises as the main one does."""
    config, sent = evaluation_of(tmp_path), []
    publish(tmp_path, data="0123")
    data = datasets.Data(config.data)
    data.get = lambda *args, **more: pytest.fail("opened")
    monkeypatch.setattr(distributed, "from_main", lambda text: sent[-1])
    sent.append("changed the data are others")
    with pytest.raises(DataChanged, match="^the data are others$"):
        ReferenceStatistics.from_config(config, CPU, data, get_codec(config))
    sent.append("unread no such folder")
    (statistics,) = ReferenceStatistics.from_config(config, CPU, data, get_codec(config))
    assert statistics.origin["split"] == "published"


def test_published_statistics_do_without_the_data(tmp_path, caplog):
    caplog.set_level("INFO")
    config = evaluation_of(tmp_path)
    publish(tmp_path, data="0123")
    config.data.path = str(tmp_path / "nowhere")
    (statistics,) = statistics_of(config)
    assert statistics.origin["split"] == "published"
    assert "cannot be compared with the training images" in caplog.text


def test_restoration_does_not_go_on_without_changed_data():
    def get(*args, **more):
        raise DataChanged("other data")

    run = SimpleNamespace(codec=SimpleNamespace(shape=(1, 4, 4)), data=SimpleNamespace(get=get))
    measurement = SimpleNamespace(value=torch.ones(2, 1, 4, 4))
    with pytest.raises(DataChanged):
        plain_restoration(run, measurement)


def test_published_statistics_of_a_further_space_have_it_in_their_name(tmp_path, caplog):
    caplog.set_level("INFO")
    network = save_torchscript(tmp_path / "network.pt", MeanColour())
    both = {"features": "torchscript,pixels", "inception_path": str(network)}
    config = evaluation_of(tmp_path, **both)
    publish(tmp_path, width=3)
    scripted, pixels = statistics_of(config)
    assert scripted.origin["data"] == "folder_stats.npz"
    assert pixels.origin["split"] == "train"
    assert "no folder_4_pixels_stats.npz or folder_pixels_stats.npz" in caplog.text
    publish(tmp_path, name="folder_pixels_stats")
    assert statistics_of(config)[1].origin["data"] == "folder_pixels_stats.npz"
    publish(tmp_path, name="folder_4_pixels_stats")
    assert statistics_of(config)[1].origin["data"] == "folder_4_pixels_stats.npz"


def test_values_of_a_further_space_are_ranked_by_its_reference():
    def of(first, further):
        names = {"reference.digest": first, "torchscript:reference.digest": further}
        values = report(1, {"fid": 1.0, "torchscript:fid": 2.0}, **BOTH, **names)
        return values | {"features": np.array("pixels,torchscript")}

    pair = [of("ab", "cd"), of("ab", "12")]
    assert obstacle("fid", pair) == ""
    assert obstacle("torchscript:fid", pair) == "reference.digest differs (cd; 12)"
    pair = [of("ab", "cd"), of("12", "cd")]
    assert obstacle("fid", pair) == "reference.digest differs (ab; 12)"
    assert obstacle("torchscript:fid", pair) == ""


@pytest.mark.parametrize("published", [False, True])
def test_the_training_split_is_opened_and_digested_once_for_all_spaces(
    published, tmp_path, monkeypatch
):
    network, calls = save_torchscript(tmp_path / "network.pt", MeanColour()), []
    both = {"features": "torchscript,pixels", "inception_path": str(network)}
    config = evaluation_of(tmp_path, **both)
    data = datasets.Data(config.data)
    digest, get = fingerprint(data.get("train")), data.get
    if published:
        publish(tmp_path, width=3, data=digest)
    data.get = lambda *args, **more: calls.append("open") or get(*args, **more)
    of_array = digests.of_array
    monkeypatch.setattr(
        digests, "of_array", lambda *args, **more: calls.append("digest") or of_array(*args, **more)
    )
    scripted, pixels = ReferenceStatistics.from_config(config, CPU, data, get_codec(config))
    assert calls == ["open", "digest"]
    assert pixels.origin["digest"] == digest
    assert scripted.data is (None if published else pixels.data)


def test_paths_go_to_the_spaces_that_need_one(tmp_path, monkeypatch):
    loaded_paths = {}

    def space(name):
        def load(path, device):
            loaded_paths[name] = path
            return pixels(path, device)

        return load

    loaders = {name: space(name) for name in ("plain", "first", "second")}
    loaders["first"].needs_path = loaders["second"].needs_path = True
    for name, load in loaders.items():
        monkeypatch.setitem(FEATURES, name, load)

    def paths_of(kinds, paths):
        loaded_paths.clear()
        get_spaces(kinds, paths, EightBitImages((1, 4, 4)), CPU)
        return {**loaded_paths}

    assert paths_of("plain,first", "a, b.pt") == {"plain": "", "first": "a, b.pt"}
    assert paths_of("second,plain,first", "a, b") == {"second": "a", "plain": "", "first": "b"}
    assert paths_of("first,second", ",b") == {"first": "", "second": "b"}
    for paths in ("", "a", "a,b,c"):
        with pytest.raises(ValueError, match="needs 2 paths .* of first, second") as caught:
            paths_of("first,second", paths)
        assert "\n" not in str(caught.value) and not loaded_paths
