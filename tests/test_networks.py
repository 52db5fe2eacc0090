"""Networks of feature spaces: torch.export programs, several at once, files of other content."""

import contextlib
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_evaluate import Killed, assert_same_metrics, evaluate, save_checkpoints, tiny
from test_metrics import (
    CPU,
    MeanColour,
    OnlyFeatures,
    random_images,
    save_torchscript,
    space_of,
)

import sampling
from configs.default import all_keys
from metrics.features import get_spaces
from metrics.table import METRICS
from reports import evaluation_page
from sources.codec import EightBitImages
from storage import files

CODEC = EightBitImages((3, 8, 8))


def save_exported(path, module):
    """A program of torch.export that takes any number of images, of two or more."""
    example = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    dimensions = ({0: torch.export.Dim("n", min=2)},)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=dimensions), path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return save_exported(folder / "colour.pt2", MeanColour()), save_torchscript(
        folder / "colour.pt", MeanColour()
    )


@pytest.mark.parametrize("n", [1, 7])
def test_an_exported_program_gives_what_torchscript_gives(n, exported):
    """Any file name, and also a batch of one, though it was exported for two or more."""
    images = random_images(n=n)
    (features, logits), expected = (space_of("network", path)(images) for path in exported)
    np.testing.assert_allclose(features, expected[0])
    np.testing.assert_allclose(logits, expected[1])
    np.testing.assert_allclose(features, images.mean((1, 2)), rtol=1e-6)
    names = [space_of(kind, path).name for kind in ("network", "torchscript") for path in exported]
    assert names[:2] == names[2:]  # "torchscript" is the older name of "network"
    assert [name.partition("-")[0] for name in names[:2]] == ["pt2", "torchscript"]


def test_grey_images_are_repeated_for_an_exported_program(exported):
    images = random_images(channels=1)
    features, _ = space_of("network", exported[0], channels=1)(images)
    np.testing.assert_allclose(features, images.mean((1, 2)).repeat(3, axis=1), rtol=1e-6)


def test_several_networks_have_labels(exported, tmp_path):
    pixel = save_torchscript(tmp_path / "first.pt", OnlyFeatures())
    text, paths = "network:Inception, pixels,network:dinov2", f"{exported[0]}, {pixel}"
    assert all_keys()["eval.features"].accepts(text.replace("I", "i"))
    spaces = get_spaces(text, paths, CODEC, CPU)
    assert [space.label for space in spaces] == ["inception", "pixels", "dinov2"]
    assert [space.width for space in spaces] == [3, 192, 5]
    labels = [METRICS["fid"].label_in(space.label) for space in spaces]
    assert labels == ["FID", "Fréchet distance, pixels", "Fréchet distance, dinov2"]


@pytest.mark.parametrize(
    "text, paths, pattern",
    [
        ("network,network", "a,b", "names a space twice: label them, network:dinov2"),
        ("network:a,pixels:a", "a", "names a space twice"),
        ("network:a,network:b", "a", "needs 2 paths with commas between them, of a, b"),
        ("network:a,network:b", "a,b", "needs a file: eval.inception_path='a'"),
    ],
)
def test_spaces_that_do_not_fit_together_are_one_line(text, paths, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        get_spaces(text, paths, CODEC, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["network:", "network:a b", "network:../x", "pixel:a", "a:network"]
)
def test_labels_are_words(text):
    assert not all_keys()["eval.features"].accepts(text)


def test_a_damaged_program_is_one_line(exported, tmp_path):
    path = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(exported[0]) as archive, zipfile.ZipFile(path, "w") as damaged:
        for name in archive.namelist():
            content = archive.read(name)
            damaged.writestr(
                name, content[: len(content) // 2] if "model.json" in name else content
            )
    with pytest.raises(ValueError, match=f"{path} is no program of torch.export") as caught:
        space_of("network", path)
    assert "\n" not in str(caught.value)
    path.write_bytes(exported[0].read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a TorchScript module, nor a program"):
        space_of("network", path)


def test_a_program_for_other_images_is_one_line(exported):
    with pytest.raises(ValueError, match=r"does not take images of shape \(9, 9, 3\)"):
        space_of("network", exported[0], size=9)


def test_two_spaces_cost_one_pass_of_sampling_killed_or_not(tmp_path, exported, monkeypatch):
    """The process dies between the features of a round, and after the samples of another."""
    options = {"enable_bpd": False, "enable_loss": False, "num_samples": 60, "batch_size": 20}
    networks = {"features": "pixels,network:colour", "inception_path": str(exported[0])}
    config, workdir = tiny(tmp_path, **options, **networks), tmp_path / "run"
    save_checkpoints(config, workdir, 4)
    calls, call = [], sampling.Sampler.__call__
    counted = lambda self, *rest, **more: calls.append(1) or call(self, *rest, **more)  # noqa: E731
    monkeypatch.setattr(sampling.Sampler, "__call__", counted)
    expected = evaluate(config, workdir)
    assert len(calls) == 3  # rounds
    assert {"fid", "colour:fid", "colour:fid_high", "colour:IS_low"} <= expected.keys()
    shutil.rmtree(workdir / "eval")
    shutil.rmtree(config.eval.stats_dir)
    calls.clear()
    write = files.atomic_write
    for number in (4, 5, 99):  # 2 statistics, then for each round 1 of samples and 2 of features
        budget = iter(range(number))

        def write_some(path, budget=budget):
            if next(budget, None) is None:
                raise Killed
            return write(path)

        for module in (evaluation_page, files):
            monkeypatch.setattr(module, "atomic_write", write_some)
        with pytest.raises(Killed) if number < 99 else contextlib.nullcontext():
            report = evaluate(config, workdir)
    assert len(calls) == 3  # none is drawn again
    assert_same_metrics(report, expected)


def test_the_recipe_for_files_of_networks(tmp_path):
    """The code in docs/metrics.md works, with a small network in place of DINOv2."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.S)[1]
    recipe = {}
    exec(code, recipe)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    scaled = recipe["Scaled"](network, 12, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    recipe["save"](scaled, tmp_path / "small.pt2", 8, 8)
    images = random_images(n=3)
    features, logits = space_of("network", tmp_path / "small.pt2")(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    x = torch.nn.functional.interpolate(x, (12, 12), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    expected = network.double()((x.clamp(0, 255) / 255 - mean) / std)
    np.testing.assert_allclose(features, expected.detach(), atol=1e-4)
    assert logits is None
