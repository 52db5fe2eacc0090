"""Class labels: where they come from, how they travel, what is learned and sampled with them."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import pictures, write_tree, write_zip
from known_laws import FAMILY, SDES, gaussian_network, pfgmpp
from PIL import Image
from sklearn.datasets import load_digits
from test_small_runs import report_of, tiny

import datasets
import experiment
import run_lib
from completion import complete
from configs.vp import digits_ddpmpp, images32_ddpmpp
from library import evaluated_samples
from library.conditions import ConditionDrawer
from library.restoration import ToRestore
from likelihood import Likelihood, get_likelihood_fn, log_posterior
from losses import Regression, get_loss_fn
from methods import field, get_method
from methods.base import Examples
from methods.field import poisson_field
from methods.guidance import Guided
from metrics.reference import Reference
from metrics.table import Comparison, compare
from models.weights import load_ema
from sampling import Guidance, ODESampler, solve_ode
from solvers.solve import solve_sde
from sources.batch import Batch, Conditions
from sources.codec import EightBitImages
from sources.splits import held_out
from storage.checkpoints import load_checkpoint

CLASSES = {"cat": 10, "dog": 20, "emu": 30}  # names, and the grey of their images


def folder_config(path, classes=-1, **data):
    config = images32_ddpmpp.get_config()
    config.data.update(path=str(path), image_size=4, num_channels=1, num_classes=classes, **data)
    return config


def grey(level, n=10):
    return [np.full((4, 4), level, np.uint8)] * n


def class_tree(root, below=""):
    for name, level in CLASSES.items():
        write_tree(root / below / name, grey(level))


def check_labels(config, labels_of_grey, splits=("train", "test")):
    """Each image, by the grey of its first pixel, has its label: in memory and on disk."""
    for split, limit in itertools.product(splits, (2**31, 0)):
        config.data.update(resident_bytes=limit, num_workers=0)
        data = datasets.get_dataset(config, split)
        assert isinstance(data, datasets.Stream) == (limit == 0)
        batches = itertools.islice(datasets.shuffled_batches(data, 4, seed=1), 2 * len(data))
        for batch in (*datasets.in_order(data, 4), *batches, datasets.batch_at(data, slice(3))):
            expected = [labels_of_grey[int(level)] for level in batch.images[:, 0, 0, 0]]
            assert batch.labels.tolist() == expected
            assert batch.labels.dtype == torch.int64


# --- sources --------------------------------------------------------------------------------------


def test_digits():
    config = digits_ddpmpp.get_config()
    plain = datasets.get_dataset(config, "train")
    config.data.num_classes = 10
    data = datasets.get_dataset(config, "train")
    assert isinstance(plain, torch.Tensor)
    assert torch.equal(data.images, plain)
    assert data.labels.tolist() == load_digits().target[held_out(1797, "train")].tolist()
    assert data.names == tuple("0123456789")
    assert torch.equal(datasets.Data(config.data).labels("train"), data.labels)
    assert torch.equal(datasets.get_dataset(config, "train", labels=False), plain)


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders(tmp_path, packed):
    class_tree(tmp_path / "animals")
    if packed:
        write_zip(tmp_path / "animals.zip", tmp_path / "animals")
    config = folder_config(tmp_path / ("animals.zip" if packed else "animals"))
    assert datasets.Data(config.data).measure_classes() == 3
    check_labels(config, {10: 0, 20: 1, 30: 2})
    train, test = (datasets.get_dataset(config, split) for split in datasets.SPLITS)
    config.data.num_classes = 3
    assert "3 classes (0 cat, 1 dog, 2 emu)" in datasets.Data(config.data).describe(train, test)


def test_class_folders_below_splits_are_numbered_alike(tmp_path):
    write_tree(tmp_path / "train/cat", grey(10))
    write_tree(tmp_path / "train/emu", grey(30))
    write_tree(tmp_path / "test/dog", grey(20))
    write_tree(tmp_path / "other/ant", grey(40))
    check_labels(folder_config(tmp_path), {10: 0, 20: 1, 30: 2})


@pytest.mark.parametrize("packed", [False, True])
def test_dataset_json(tmp_path, packed):
    """EDM's labels count although folders are no classes; in a zip they may be one folder down."""
    root = tmp_path / "set"
    levels = [(5 * i) % 40 for i in range(24)]
    for i, level in enumerate(levels):
        write_tree(root / f"0000{i % 2}", grey(level, 1), f"img{i:04d}.png")
    lines = [[f"0000{i % 2}/img{i:04d}.png", level // 10] for i, level in enumerate(levels)]
    (root / "dataset.json").write_text(json.dumps({"labels": lines}))
    if packed:
        write_zip(tmp_path / "set.zip", root)
    config = folder_config(tmp_path / ("set.zip" if packed else "set"))
    assert datasets.Data(config.data).measure_classes() == 4
    check_labels(config, {level: level // 10 for level in levels})


@pytest.mark.parametrize("has_splits", [False, True])
def test_labels_of_an_npz(tmp_path, has_splits):
    levels = np.arange(20, dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (20, 4, 4, 1))
    splits = {"train": slice(12), "test": slice(12, 20)} if has_splits else {"images": slice(None)}
    arrays = {name: images[rows] for name, rows in splits.items()}
    for name, rows in splits.items():
        arrays[f"{name}_labels" if has_splits else "labels"] = levels[rows] % 3
    np.savez(tmp_path / "x.npz", **arrays)
    config = folder_config(tmp_path / "x.npz")
    config.data.update(resident_bytes=2**31)
    for split in datasets.SPLITS:
        for batch in datasets.in_order(datasets.get_dataset(config, split), 5):
            assert batch.labels.tolist() == [int(i) % 3 for i in batch.images[:, 0, 0, 0]]
    config.data.num_classes = 0  # no label is read
    assert isinstance(datasets.get_dataset(config, "train"), torch.Tensor)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_takes_its_label_along(tmp_path, workers):
    class_tree(tmp_path)
    for path in sorted(tmp_path.glob("*/*.png"))[3:29:5]:
        path.write_bytes(b"damaged")
    config = folder_config(tmp_path)
    for limit in (2**31, 0):
        config.data.update(resident_bytes=limit, num_workers=workers)
        data = datasets.get_dataset(config, "train")
        for batch in datasets.in_order(data, 6):
            assert ((batch.labels + 1) * 10 == batch.images[:, 0, 0, 0]).all()
    config.data.resident_bytes = 2**31
    assert len(datasets.get_dataset(config, "train")) < 27


def mistake(config, split="train"):
    with pytest.raises(ValueError) as caught:
        datasets.get_dataset(config, split)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_data_without_labels(tmp_path):
    write_tree(tmp_path / "flat", pictures(10))
    line = mistake(folder_config(tmp_path / "flat"))
    assert "10 of 10 images" in line
    assert "such as 000.png: each class needs a folder, or each image a line in dataset.js" in line
    np.save(tmp_path / "x.npy", pictures(10, 4, 4, 1))
    assert "an .npy has none" in mistake(folder_config(tmp_path / "x.npy"))
    np.savez(tmp_path / "x.npz", images=pictures(10, 4, 4, 1))
    assert "there is no array labels" in mistake(folder_config(tmp_path / "x.npz"))


def test_labels_that_are_missing_for_some(tmp_path):
    class_tree(tmp_path)
    write_tree(tmp_path, grey(1, 2), "stray{i}.png")
    line = mistake(folder_config(tmp_path))
    assert "2 of 32 images" in line
    assert "such as stray0.png" in line
    (tmp_path / "dataset.json").write_text('{"labels": [["cat/000.png", 1]]}')
    assert "31 of 32 images" in mistake(folder_config(tmp_path))


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"labels": null}', "it has no labels"),
        ('{"labels": [["a.png", [0.5, 0.5]]]}', "'a.png' has the label"),
        ('{"labels": [["a.png", -1]]}', "'a.png' has the label -1, no class's number"),
        ('{"labels": [["a.png", true]]}', "'a.png' has the label True"),
        ('{"labels": [3]}', "dataset.json gives no class labels"),
        ("[" * 10**5, "dataset.json gives no class labels"),
        ("[]", "dataset.json gives no class labels"),
    ],
)
def test_damaged_dataset_json(tmp_path, content, reason):
    write_tree(tmp_path, grey(1))
    (tmp_path / "dataset.json").write_text(content)
    assert reason in mistake(folder_config(tmp_path))


@pytest.mark.parametrize(
    "labels, reason",
    [
        (np.zeros(9, np.int64), r"10 whole numbers, one for each image, not int64 (9,)"),
        (np.zeros(10), "not float64 (10,)"),
        (np.full(10, -1), "labels has the label -1"),
    ],
)
def test_labels_of_an_npz_that_are_none(tmp_path, labels, reason):
    np.savez(tmp_path / "x.npz", images=pictures(10, 4, 4, 1), labels=labels)
    assert reason in mistake(folder_config(tmp_path / "x.npz"))


def test_labels_out_of_range(tmp_path):
    class_tree(tmp_path)
    line = mistake(folder_config(tmp_path, classes=2))
    assert "is 2, but with data.num_classes=2 they are numbered from 0 to 1" in line


# --- training -------------------------------------------------------------------------------------


def slow_mean(x, data, sigma, D):
    """E[y | x, sigma] of one x by its definition, in float64."""
    squared = (x - data).square().flatten(1).sum(1)
    dim = x.numel()
    if math.isinf(D):
        log_weights = -squared / (2 * sigma**2)
    else:
        log_weights = -(dim + D) / 2 * (squared + D * sigma**2).log()
    return (log_weights.softmax(0)[:, None] * data.flatten(1)).sum(0)


LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 2, 1, 1, 0, 1])


def labelled(images, labels):
    return Batch(images, Conditions(class_labels=labels))


def labelled_batches():
    """Reference images of three classes, and examples of them, two without a label."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(11, 1, 2, 3, generator=generator, dtype=torch.float64)
    x = data[:6] + 0.5 * torch.randn(6, 1, 2, 3, generator=generator, dtype=torch.float64)
    labels = LABELS[:6].clone()
    labels[[1, 4]] = -1
    return labelled(x, labels), labelled(data, LABELS)


def reference_of(label, reference):
    return reference.images if label < 0 else reference.images[reference.labels == label]


@pytest.mark.parametrize("chunk", [2, 3, 2048])  # in small chunks some classes are absent
@pytest.mark.parametrize("D", [1.0, 7.5, math.inf])
def test_the_posterior_mean_of_a_class(monkeypatch, chunk, D):
    monkeypatch.setattr(field, "DATA_CHUNK", chunk)
    examples, reference = labelled_batches()
    sigma = torch.linspace(0.05, 3, 6, dtype=torch.float64)
    among = field.own_class(examples, reference)
    means = field.posterior_mean(examples.images, reference.images, sigma, D, among)
    perturbed = Examples(**vars(examples), t=sigma, clean=examples.images, noise=examples.images)
    target = pfgmpp(D, target_kind="posterior_mean").target(perturbed, reference)
    assert torch.equal(target, means.flatten(1))
    for i, label in enumerate(examples.labels.tolist()):
        class_images = reference_of(label, reference)
        expected = slow_mean(examples.images[i], class_images, sigma[i], D)
        torch.testing.assert_close(means[i].flatten(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [2, 2048])
def test_the_field_of_a_class(monkeypatch, poisson, chunk):
    """Sum over the charges of the class alone of direction / distance^(D+1)."""
    monkeypatch.setattr(field, "DATA_CHUNK", chunk)
    examples, reference = labelled_batches()
    z = torch.linspace(0.1, 4, 6, dtype=torch.float64)
    points = {"images": examples.images, "conditions": examples.conditions, "z": z}
    perturbed = type(poisson.draw(Batch(torch.zeros(1, 1, 2, 3))))(**points)
    fields = poisson.target(perturbed, reference)
    for i, label in enumerate(examples.labels.tolist()):
        charges = reference_of(label, reference).flatten(1)
        way = torch.cat([charges - examples.images[i].flatten(), -z[i].expand(len(charges), 1)], 1)
        distance = way.norm(dim=1, keepdim=True)
        weights = (distance.min() / distance) ** 7
        total = (weights * way).sum(0) / weights.sum()
        expected = math.sqrt(6) * total / (total.norm() + poisson.gamma)
        torch.testing.assert_close(fields[i], expected, rtol=1e-9, atol=1e-9)


def test_label_dropout_is_the_last_draw():
    config = digits_ddpmpp.get_config()
    method, images = get_method(config), torch.rand(4000, 1, 2, 2)
    labels = torch.arange(4000)

    def draw(dropout, labels):
        objective = Regression(method, True, 4000, 4000, dropout)
        batch = labelled(images, labels)
        return objective.draw(batch, generator=torch.Generator().manual_seed(3))

    full, dropped, none = draw(0.0, labels), draw(0.25, labels), draw(0.25, None)
    assert torch.equal(full.labels, labels)
    assert none.labels is None
    gone = dropped.labels == -1
    assert torch.equal(dropped.labels[~gone], labels[~gone])
    assert abs(gone.float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    for other in (dropped, none):
        assert torch.equal(full.images, other.images)
        assert torch.equal(full.t, other.t)
    config.training.label_dropout = 0.3
    assert get_loss_fn(config, method).label_dropout == 0.3


RUNS = {
    "poisson": ("poisson/digits_ddpmpp.py", {"model__name": "ncsnpp"}),
    "pfgmpp": ("pfgmpp/digits_ddpmpp.py", {"training__target": "posterior_mean"}),
    "edm": ("edm/digits_ddpmpp.py", {"model__name": "adm"}),
    "vp": ("vp/digits_ddpmpp.py", {"model__name": "ddpm"}),
    "subvp": ("subvp/digits_ddpmpp.py", {"training__accumulate": 2}),
    "ve": (
        "ve/digits_ncsnpp.py",
        {"eval__enable_bpd": True, "sampling__rtol": 0.5, "sampling__atol": 0.5},
    ),
}


def weights_of(workdir, step):
    return load_checkpoint(workdir / f"checkpoints/checkpoint_{step}.pth")


@pytest.mark.parametrize("name", RUNS)
def test_every_method_learns_and_samples_classes(tmp_path, name, one_thread):
    path, changes = RUNS[name]
    changes = {"data__num_classes": -1, "eval__bpd_num_repeats": 1, **changes}
    config = tiny(path, tmp_path, **changes)
    assert run_lib.train(config, tmp_path)
    content = weights_of(tmp_path, 2)
    assert content["config"]["data.num_classes"] == 10
    assert content["model"]["label_embedding.weight"].shape[1] == 10
    config.sampling.guidance, config.eval.enable_interpolate = 2.0, True
    run_lib.evaluate(config, tmp_path)
    assert np.isfinite(report_of(tmp_path, 2)["loss"])
    with np.load(tmp_path / "eval/ckpt_2/samples_0.npz") as file:
        labels = file["labels"]
    expected = experiment.Experiment.build(complete(config, tmp_path)[0])
    assert labels.tolist() == expected.draw_conditions(10, "samples", 0)["class_labels"].tolist()


@pytest.mark.parametrize("limit", [2**31, 0])
def test_a_resumed_run_with_labels_is_the_same(tmp_path, monkeypatch, limit, one_thread):
    def config():
        return tiny(
            "pfgmpp/digits_ddpmpp.py",
            tmp_path,
            data__num_classes=10,
            data__resident_bytes=limit,
            training__n_iters=4,
            training__snapshot_sampling=False,
            training__label_dropout=0.5,
        )

    step, batches = run_lib.train_step, []

    def killed(state, batch, *rest):
        if state.step == 3:
            raise KeyboardInterrupt
        return step(state, batch, *rest)

    def watched(state, batch, *rest):
        batches.append((state.step, batch.labels.tolist()))
        return step(state, batch, *rest)

    monkeypatch.setattr(run_lib, "train_step", watched)
    run_lib.train(config(), tmp_path / "whole")
    whole, batches = batches, []
    monkeypatch.setattr(run_lib, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_lib.train(config(), tmp_path / "killed")
    monkeypatch.setattr(run_lib, "train_step", watched)
    run_lib.train(config(), tmp_path / "killed")
    assert batches == whole[3:]
    assert len({label for _, labels in whole for label in labels}) == 10
    a, b = (weights_of(tmp_path / name, 4) for name in ("whole", "killed"))
    for key, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][key])


# --- guidance -------------------------------------------------------------------------------------

METHODS = {"edm": FAMILY["edm"], **SDES}
MEANS, STD = (-0.4, 0.7), 0.3  # of the two classes
UNCONDITIONAL = 0.1  # mean of the law without a class
EVERYWHERE = (0.0, math.inf)


def class_network(method, means=(*MEANS, UNCONDITIONAL), std=STD):
    """The exact network of two Gaussian classes, and of a Gaussian in between without a label."""
    nets = [gaussian_network(method, mean, std) for mean in means]

    def net(x, noise_label, class_labels=None):
        labels = torch.full((len(x),), -1) if class_labels is None else class_labels
        return sum(
            each(x, noise_label) * (labels == k).to(x).view(-1, 1, 1, 1)
            for k, each in zip((0, 1, -1), nets, strict=True)
        )

    return net


def conditional(net, labels):
    return lambda x, noise_label: net(x, noise_label, class_labels=labels)


def check_law(samples, labels, weight, allowed=0.0):
    """Each class's samples are N(u + w (m - u), STD^2) of independent entries."""
    for k, mean in enumerate(MEANS):
        class_samples = samples[labels == k].double().flatten(1)
        expected = UNCONDITIONAL + weight * (mean - UNCONDITIONAL)
        n, dim = class_samples.shape
        error = STD / math.sqrt(n)
        assert (class_samples.mean(0) - expected).abs().max() < 5 * error + allowed
        covariance = class_samples.T.cov()
        exact = STD**2 * torch.eye(dim, dtype=torch.float64)
        assert (covariance - exact).abs().max() < 5 * math.sqrt(2) * STD * error + allowed


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("solver", ["heun", "rk45"])
@pytest.mark.parametrize("name", METHODS)
def test_the_law_of_a_class_under_guidance(name, solver, weight, one_thread):
    """Mixed denoisers of Gaussians of one variance are the denoiser of a Gaussian."""
    method, labels = METHODS[name], torch.arange(4000) % 2
    net = class_network(method)
    generator = torch.Generator().manual_seed(1)
    x = method.prior_sampling((4000, 1, 1, 2), generator).double()
    followed = method if weight == 1 else Guided(method, net, weight, EVERYWHERE)
    options = {"solver": solver, "n": 40, "noise_removal": True}
    samples, _ = solve_ode(followed, conditional(net, labels), x, **options)
    check_law(samples, labels, weight, allowed=0.01)


def test_a_guide_is_told_the_class():
    """Its classes are elsewhere; without a label it would lead far away."""
    method, labels = METHODS["edm"], torch.arange(400) % 2
    net, guide = (class_network(method, (*at, 9.0), 0.05) for at in ((-0.4, 0.5), (-0.2, 0.1)))
    sampler = ODESampler(
        method=method,
        codec=EightBitImages((1, 1, 2)),
        guidance=Guidance(2.0, guide=guide),
        solver="heun",
    )
    x = method.prior_sampling((400, 1, 1, 2), torch.Generator().manual_seed(0))
    samples, _ = sampler(net, x=x, conditions={"class_labels": labels})
    for k, expected in ((0, -0.6), (1, 0.9)):
        assert 2 * samples[labels == k].mean() - 1 == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_the_law_of_a_class_by_predictor_and_corrector(weight, one_thread):
    method, labels = SDES["vp"], torch.arange(4000) % 2
    net, generator = class_network(method), torch.Generator().manual_seed(1)
    x = method.prior_sampling((4000, 1, 1, 2), generator)
    followed = Guided(method, net, weight, EVERYWHERE)
    options = {"corrector": "none", "generator": generator}
    samples, _ = solve_sde(method, followed, conditional(net, labels), x, **options)
    check_law(samples, labels, weight, allowed=0.01)


def test_a_poisson_flow_mixes_slopes(poisson):
    """Slopes of exact fields mix in every variable; mixed fields would have another slope."""
    generator = torch.Generator().manual_seed(0)
    charges = torch.rand(8, 1, 2, 2, generator=generator)
    labels = torch.arange(8) % 2
    y = 3 * torch.randn(6, 1, 2, 2, generator=generator)
    classes = torch.arange(6) % 2

    def net(x, z, class_labels=None):
        points = torch.cat([x.flatten(1), z[:, None]], dim=1)
        among = None if class_labels is None else class_labels[:, None] == labels
        vectors = poisson_field(points, charges, poisson.gamma, among)
        return vectors[:, :-1].view_as(x), vectors[:, -1]

    with_labels, w = conditional(net, classes), 3.0
    guided = Guided(poisson, net, w, EVERYWHERE)
    for z in (0.05, 2.0, 20.0):
        c, u = poisson.slope(with_labels, y, z), poisson.slope(net, y, z)
        torch.testing.assert_close(guided.slope(with_labels, y, z), u + w * (c - u))
        torch.testing.assert_close(guided.ode(with_labels, y, math.log(z)), z * (u + w * (c - u)))
        denoised = guided.denoise(net, y, z, class_labels=classes)
        torch.testing.assert_close(denoised, y - z * (u + w * (c - u)))
    assert guided.t_prior == poisson.t_prior


def test_guidance_stays_in_its_interval():
    method, labels, x = METHODS["edm"], torch.tensor([0, 1]), torch.randn(2, 1, 2, 2)
    net = class_network(method)
    with_labels = conditional(net, labels)
    guided = Guided(method, net, 2.0, (0.5, 3.0))
    for sigma, inside in ((0.4, False), (0.5, False), (0.51, True), (3.0, True), (3.01, False)):
        same = torch.equal(guided.slope(with_labels, x, sigma), method.slope(with_labels, x, sigma))
        assert same != inside


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir of two steps with labels on the digits, its config and its last checkpoint."""
    workdir = tmp_path_factory.mktemp("labels")
    config = tiny("vp/digits_ddpmpp.py", workdir, data__num_classes=10, model__num_scales=50)
    config.training.snapshot_sampling = False
    config.optim.warmup = 0
    run_lib.train(config, workdir)
    return workdir, config, workdir / "checkpoints/checkpoint_2.pth"


def sampled(config, **changes):
    """Samples of the trained network, with `changes` in `config.sampling`."""
    config = config.copy_and_resolve_references()
    config.sampling.update(changes)
    run = experiment.Experiment.build(config)
    for parameter in run.network.parameters():  # large enough that the label changes the output
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    generator, conditions = torch.Generator().manual_seed(0), run.draw_conditions(4, "test")
    return run.sampler(run.network.eval(), 4, generator=generator, conditions=conditions)[0]


def test_guidance_by_config(trained):
    _, config, checkpoint = trained
    plain = sampled(config)
    rk45 = {"ode_solver": "rk45", "rtol": 0.1, "atol": 0.1}
    for method in ({}, rk45, {"method": "pc"}):
        assert not torch.equal(sampled(config, guidance=3.0, **method), sampled(config, **method))
    assert torch.equal(sampled(config, guidance=3.0, guidance_interval=(0.5, 0.5)), plain)
    whole = sampled(config, guidance=3.0, guidance_interval=(0.0, math.inf))
    assert torch.equal(whole, sampled(config, guidance=3.0))
    by_another = sampled(config, guidance=3.0, guide=str(checkpoint))
    assert not torch.equal(by_another, plain)
    assert not torch.equal(by_another, whole)
    assert not torch.equal(sampled(config, class_label=3), sampled(config, class_label=4))


def test_a_network_guides_itself_nowhere(trained):
    """Autoguidance by the same EMA weights is none, whatever its weight."""
    _, config, checkpoint = trained
    config = config.copy_and_resolve_references()
    config.sampling.update(guidance=4.0, guide=str(checkpoint))
    run = experiment.Experiment.build(config)
    load_ema(run.network.eval(), load_checkpoint(checkpoint))
    conditions, samples = run.draw_conditions(3, "test"), []
    for sampler in (run.sampler, replace(run.sampler, guidance=None)):
        generator = torch.Generator().manual_seed(0)
        samples.append(sampler(run.network, 3, generator=generator, conditions=conditions)[0])
    torch.testing.assert_close(*samples, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"training.label_dropout": 0.0}, "sampling.guidance=2.0 needs a network trained with"),
        ({"data.num_classes": 0}, "sampling.guidance=2.0 needs a network trained with"),
        ({"sampling.guidance_interval": (2.0, 1.0)}, "sampling.guidance_interval must rise"),
        ({"sampling.class_label": 10}, "no class of the network: it has those from 0 to 9"),
        ({"sampling.class_label": 0, "data.num_classes": 0}, "none (data.num_classes=0)"),
        ({"sampling.guide": "{}", "sampling.guidance": 1.0}, "changes nothing where"),
        ({"sampling.guide": "{}", "data.centered": False}, "its data.centered is True, not False"),
        ({"sampling.guide": "{}", "training.sde": "subvpsde"}, "its training.sde is vpsde"),
        ({"sampling.guide": __file__}, "is not a checkpoint"),
        (
            {"model.name": "ncsnv2_64", "training.sde": "vesde", "training.continuous": False},
            "takes no class or augmentation labels",
        ),
    ],
)
def test_what_cannot_be_guided_is_one_line(trained, changes, reason):
    _, config, checkpoint = trained
    config = config.copy_and_resolve_references()
    config.sampling.guidance = 2.0
    values = {k: str(checkpoint) if v == "{}" else v for k, v in changes.items()}
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError) as caught:
        experiment.Experiment.build(config)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_are_drawn_as_in_the_data(tmp_path):
    """Nine tenths of the data are of one class; a key gives equal labels at every call."""
    levels = np.where(np.arange(1000) % 10 == 0, 1, 0)
    np.savez(tmp_path / "x.npz", images=pictures(1000, 4, 4, 1), labels=levels)
    config = folder_config(tmp_path / "x.npz", classes=2)

    def draw(number, *key):
        run_data = datasets.Data(config.data)
        drawer = ConditionDrawer(run_data, torch.device("cpu"), config.seed)
        return drawer(number, *key).get("class_labels")

    labels = draw(5000, "samples", 3)
    share = float(datasets.Data(config.data).labels("train").float().mean())
    assert abs(labels.float().mean() - share) < 5 * math.sqrt(share / 5000)
    assert torch.equal(labels, draw(5000, "samples", 3))
    assert not torch.equal(labels, draw(5000, "samples", 4))
    config.data.num_classes = 0
    assert draw(5, "samples") is None


# --- evaluation -----------------------------------------------------------------------------------


def test_agreement_of_samples_with_their_labels():
    """Classes lie far apart, and 7 of 30 samples have the label of another one."""
    random = np.random.default_rng(0)
    centres = np.array([[0, 0, 0], [20, 0, 0], [0, 20, 0]])
    classes, labels = random.integers(3, size=200), np.arange(30) % 3
    data = centres[classes] + random.standard_normal((200, 3))
    samples = centres[labels] + random.standard_normal((30, 3))
    sample_labels = np.where(np.arange(30) < 7, (labels + 1) % 3, labels)
    reference = Reference.measure([data], 200, 200)
    label_arrays = {"labels": sample_labels, "reference_labels": classes[reference.index]}
    scores = compare(Comparison(samples, None, reference, **label_arrays))
    assert scores["agreement"] == pytest.approx(23 / 30)
    assert scores["agreement_data"] == 1
    for missing in label_arrays:
        without = Comparison(samples, None, reference, **{**label_arrays, missing: None})
        assert "agreement" not in compare(without)
    one = {**label_arrays, "reference_labels": np.zeros(200, int)}
    assert "agreement" not in compare(Comparison(samples, None, reference, **one))


@pytest.mark.parametrize("name", ["edm", "vp"])
def test_the_most_probable_label_by_likelihood(name, one_thread):
    """log p(label | x) of two Gaussian classes, by Bayes' rule in closed form."""
    config = digits_ddpmpp.get_config()
    config.eval.divergence = "exact"
    config.sampling.rtol = config.sampling.atol = 1e-6
    method = METHODS[name]
    net, bits_per_dim = class_network(method), get_likelihood_fn(config, method)
    x = torch.randn(12, 1, 1, 2, generator=torch.Generator().manual_seed(2)).double() * 0.6
    prior = torch.tensor([1.0, 4.0], dtype=torch.float64)
    bits = [
        bits_per_dim(net, x, conditions={"class_labels": torch.full((12,), k)})[0].double()
        for k in (0, 1)
    ]
    log_p = log_posterior(math.log(2) * torch.stack(bits, 1), 2, prior)
    densities = [torch.distributions.Normal(m, STD).log_prob(x).flatten(1).sum(1) for m in MEANS]
    expected = (torch.stack(densities, 1) + (prior / 5).log()).log_softmax(1)
    torch.testing.assert_close(log_p, expected, rtol=0.02, atol=0.02)
    assert len({row.argmax().item() for row in log_p}) == 2


def test_evaluation_by_class(trained, tmp_path, monkeypatch):
    workdir, config, _ = trained
    config = config.copy_and_resolve_references()
    config.eval.update(enable_loss=False, enable_classification=True, batch_size=60)
    config.eval.stats_dir = str(tmp_path)
    solved = []

    def bits_per_dim(net, x, generator, conditions, watch=None):
        """Bits are fewest where ten times the mean of the image, in [0, 1], is the label."""
        solved.append(len(x))
        bits = 0.05 * (10 * (x + 1).flatten(1).mean(1) / 2 - conditions["class_labels"]).square()
        return bits + torch.rand(1, generator=generator), None, 1  # one probe for all labels

    bits_per_dim.divergence = "exact"
    monkeypatch.setattr(Likelihood, "from_config", lambda config, method, codec: bits_per_dim)
    for _ in range(2):  # the second time by the files of the first
        run_lib.evaluate(config, workdir, "by_class")
        assert solved == 10 * [60] + 10 * [60] + 10 * [60]
    report = report_of(workdir, 2, "by_class")
    data = datasets.get_dataset(config, "test")
    labels, images = data.labels.numpy(), data.images.double()
    brightness = 10 * ((images + 0.5) / 256).flatten(1).mean(1).numpy()
    train = np.bincount(datasets.Data(config.data).labels("train").numpy())
    log_p = np.log(train / train.sum()) - 64 * math.log(2) * 0.05 * (
        (brightness[:, None] - np.arange(10)) ** 2
    )
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    np.testing.assert_allclose(report["class_log_p"], log_p, atol=0.2)
    assert report["accuracy"] == np.mean(report["class_log_p"].argmax(1) == labels)
    assert report["accuracy"] == pytest.approx(np.mean(log_p.argmax(1) == labels), abs=0.05)
    assert 0 <= report["agreement"] <= 1
    assert report["agreement_data"] > 0.95  # classes of digits are far apart in pixels
    with Image.open(workdir / "by_class/classes_2.png") as picture:
        assert picture.size == (10 * 50 + 2, 10 * 50 + 2)
    assert "Agreement with the labels" in (workdir / "by_class/report.html").read_text()
    run = experiment.Experiment.build(config)
    config.data.num_classes = 0
    with pytest.raises(ValueError, match="eval.enable_classification needs class labels"):
        run_lib.evaluate(config, tmp_path)
    config.data.num_classes = 10
    restore = {"restore": "super2", "restore_degrade": True}
    config.sampling.update(restore)
    config.eval.num_samples = 40
    images_to_restore = ToRestore.from_config(config, run)
    assert images_to_restore.labels.tolist() == labels[:8].tolist()  # five restorations of each
    assert images_to_restore.truth.shape == (8, 1, 8, 8)
    config.sampling.class_label = 3
    run = experiment.Experiment.build(config)
    assert ToRestore.from_config(config, run).labels.tolist() == 8 * [3]


def test_restoring_images_of_unknown_class(trained, tmp_path):
    _, config, _ = trained
    config = config.copy_and_resolve_references()
    write_tree(tmp_path, pictures(3, 8, 8))
    config.sampling.update(restore="super2", restore_degrade=True, restore_path=str(tmp_path))
    run = experiment.Experiment.build(config)
    assert ToRestore.from_config(config, run).labels.tolist() == [-1, -1, -1]
    config.training.label_dropout = 0.0
    run = experiment.Experiment.build(config)
    with pytest.raises(ValueError, match="name one as sampling.class_label"):
        ToRestore.from_config(config, run)


# --- pictures -------------------------------------------------------------------------------------


def pictures_of(trained, workdir, monkeypatch, classes_shown):
    """Names and images of the pictures that an evaluation of 40 samples saves, and its page."""
    source, config, _ = trained
    shutil.copytree(source, workdir)
    config = config.copy_and_resolve_references()
    config.eval.update(num_samples=40, enable_sampling=True, enable_loss=False)
    config.sampling.guidance = 2.0
    monkeypatch.setattr("reports.images.CLASS_ROWS", classes_shown)
    saved = {}
    save = evaluated_samples.save_grid

    def keep(path, images, columns=None):
        saved[path.name] = images, columns
        save(path, images, columns)

    monkeypatch.setattr(evaluated_samples, "save_grid", keep)
    run_lib.evaluate(config, workdir)
    files = [np.load(workdir / f"eval/ckpt_2/samples_{r}.npz") for r in (0, 1)]
    samples = [np.concatenate([file[name] for file in files]) for name in ("samples", "labels")]
    return saved, *samples, (workdir / "eval/report.html").read_text()


def test_samples_stand_by_class_with_its_name(trained, tmp_path, monkeypatch):
    saved, samples, labels, page = pictures_of(trained, tmp_path / "run", monkeypatch, 10)
    images, columns = saved["ode_images_2.png"]
    assert (columns, len(images)) == (10, 100)
    for label, row in enumerate(images.reshape(10, 10, *images.shape[1:])):
        of_class = samples[labels == label][:10]
        assert (row[: len(of_class)] == of_class).all() and (row[len(of_class) :] == 128).all()
    assert len(saved["data_images_2.png"][0]) == 100
    names = re.findall(r"<ol>(.*?)</ol>", page)
    assert len(names) == 3  # samples, training images, classes
    assert [re.findall(r"<li title='(.*?)'>", each) for each in names] == 3 * [[*"0123456789"]]
    assert "<dt>classes</dt><dd>10: 0, 1, 2" in page and "<dt>guidance</dt><dd>2.0</dd>" in page


def test_samples_of_many_classes_are_sorted(trained, tmp_path, monkeypatch):
    saved, samples, labels, page = pictures_of(trained, tmp_path / "run", monkeypatch, 9)
    images, columns = saved["ode_images_2.png"]
    assert columns is None
    assert (images == samples[labels.argsort(kind="stable")]).all()
    assert "in the order of their classes" in page
