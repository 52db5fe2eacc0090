"""Field matching from end to end: training, resuming, evaluation, samples, films, sharing."""

import numpy as np
import pytest
import torch
from known_fields import moments, toy_points
from PIL import Image
from test_configs import load as load_config

import methods
import run_lib
from datasets import Data
from experiment import Experiment, load
from reports import plates, toy
from reports.settings import of_report, sampler_words
from sources.toys import TOYS
from storage.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "data.num_workers": 0,
    "model.nf": 48,
    "model.num_res_blocks": 2,
    "training.batch_size": 1024,
    "training.small_batch_size": 256,
    "training.n_iters": 400,
    "training.snapshot_freq": 400,
    "training.snapshot_sampling": False,
    "sampling.max_evaluations": 400,
    "eval.batch_size": 300,
    "eval.num_samples": 300,
}
TINY = SMALL | {"training.batch_size": 64, "training.small_batch_size": 0, "model.nf": 8}


def config_of(folder, values=SMALL, **changes):
    config = load_config("efm/toys.py")
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    stats = {"eval.stats_dir": str(folder / "stats")}
    config.update_from_flattened_dict(values | stats | changes)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of seconds, from eight Gaussians to two moons."""
    folder = tmp_path_factory.mktemp("efm")
    assert run_lib.train(config_of(folder), folder / "run")
    return folder / "run"


def test_the_learned_field_carries_one_toy_to_the_other(workdir):
    trained = load(workdir)
    images, evaluations = trained.experiment.sampler(
        trained.experiment.network, 1000, generator=torch.Generator().manual_seed(0)
    )
    ends = trained.experiment.codec.encode(images).flatten(1)
    finite = ends.isfinite().all(1)
    assert finite.double().mean() > 0.95
    toy = TOYS["moons"]()
    exact = np.repeat(toy.centres, 50, 0)
    exact += toy.std * np.random.default_rng(0).standard_normal(exact.shape)
    for moment, expected in zip(moments(ends[finite].numpy()), moments(exact), strict=True):
        assert moment == pytest.approx(expected, abs=0.08)
    assert evaluations <= 402


def test_a_run_resumes_bit_for_bit(tmp_path):
    steps = {"training__snapshot_freq_for_preemption": 4, "training__snapshot_freq": 8}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_lib.train(config_of(tmp_path, TINY, training__n_iters=8, **steps), whole)
    assert run_lib.train(config_of(tmp_path, TINY, training__n_iters=4, **steps), halves)
    assert run_lib.train(config_of(tmp_path, TINY, training__n_iters=8, **steps), halves)
    states = [load_checkpoint(w / "checkpoints/checkpoint_8.pth") for w in (whole, halves)]
    for part in ("model", "ema"):
        torch.testing.assert_close(*(s[part] for s in states), rtol=0, atol=0)


def give_up(monkeypatch, lost):
    """Let lines end where they start, but for those with `lost(luck)`, which are given up."""

    def follow(direction, points, luck, record=None, **options):
        if record:
            record(points)
        ends = points[:, :-1].clone()
        ends[lost(luck)] = torch.nan
        return ends, 3

    monkeypatch.setattr("samplers.field_lines.follow", follow)


@pytest.mark.parametrize("every", [1, 2])
def test_lines_that_are_given_up_are_in_no_picture(tmp_path, monkeypatch, caplog, every):
    give_up(monkeypatch, lambda luck: torch.arange(len(luck)) % every == 0)
    steps = {"training__n_iters": 1, "training__snapshot_freq": 1}
    config = config_of(tmp_path, TINY, training__snapshot_sampling=True, **steps)
    assert run_lib.train(config, tmp_path / "run")
    assert f"step 1: {64 // every} of 64 samples are not finite" in caplog.text
    pictures = [*(tmp_path / "run").glob("samples/*/sample.npz")]
    assert len(pictures) == every - 1
    for path in pictures:
        with np.load(path) as file:
            assert len(file["samples"]) == 32


def test_evaluated_sampled_and_shared(workdir, tmp_path):
    config = config_of(workdir.parent)
    run_lib.evaluate(config, workdir)
    with np.load(next((workdir / "eval").glob("report_*.npz"))) as report:
        assert np.isfinite([report[key] for key in ("fid", "loss")]).all()
        assert report["nonfinite"] < 15
        assert "bpd" not in report
        settings = of_report(report)
    assert sampler_words(settings) == "field lines, rtol 0.001, atol 0.001"
    priors = [
        Experiment.build(config_of(workdir.parent, data__prior_dataset=name)).method.origin()
        for name in ("eight_gaussians", "heart")
    ]
    matches = [each["prior"].startswith(settings.values["method.prior"]) for each in priors]
    assert matches == [True, False]
    assert (workdir / "eval/report.html").exists()
    run_lib.export(config, workdir, tmp_path)
    seeds = {}
    for place in (workdir, tmp_path / "model.safetensors"):
        trained = load(place)
        seeds[place] = trained.sample([3, 4])
    torch.testing.assert_close(*seeds.values(), rtol=0, atol=0)
    torch.testing.assert_close(trained.sample([4]), seeds[place][1:], rtol=0, atol=1e-3)
    film = trained.film([3, 4], frames=5)
    assert film.shape == (5, 2, 2, 1, 1)
    assert torch.equal(film[-1].flatten(), (255 * seeds[place]).round().to(torch.uint8).flatten())


@pytest.mark.parametrize("film", [False, True])
def test_samples_of_lines_that_are_given_up_are_left_out(
    workdir, tmp_path, monkeypatch, caplog, film
):
    give_up(monkeypatch, lambda luck: luck < 0.5)
    config = config_of(workdir.parent, sampling__seeds="4-13", sampling__film=film)
    run_lib.sample(config, workdir, tmp_path)
    samples = load(workdir).sample(range(4, 14), strict=False)
    finite = samples.isfinite().flatten(1).all(1).numpy()
    seeds, lost = np.arange(4, 14)[finite], np.arange(4, 14)[~finite]
    assert 0 < len(lost) < 10
    with np.load(tmp_path / "samples.npz") as file:
        assert file["seeds"].tolist() == seeds.tolist()
        stored = (255 * samples[finite]).round().to(torch.uint8).permute(0, 2, 3, 1)
        assert np.array_equal(file["samples"], stored)
    assert [int(path.stem) for path in sorted(tmp_path.glob("0*.npz"))] == seeds.tolist()
    names = ", ".join(map(str, lost))
    assert f"{len(lost)} of 10 samples are not finite and left out (seeds {names}): " in caplog.text
    if film:
        with np.load(tmp_path / "film.npz") as file:
            assert np.array_equal(file["finite"], finite)
            assert np.array_equal(file["frames"][-1, finite], stored)


def test_samples_of_which_none_ends_are_one_line(workdir, tmp_path, monkeypatch):
    give_up(monkeypatch, lambda luck: luck >= 0)
    config = config_of(workdir.parent, sampling__seeds="0-1", sampling__film=True)
    with pytest.raises(FloatingPointError, match="2 of 2 samples are not finite"):
        run_lib.sample(config, workdir, tmp_path)
    assert not (tmp_path / "samples.npz").exists()
    with pytest.raises(FloatingPointError, match="2 of 2 field lines have not ended"):
        load(workdir).sample([0, 1])


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t.encode(torch.full((1, 2, 1, 1), 0.5)),
        lambda t: t.decode(torch.zeros(1, 2, 1, 1)),
        lambda t: t.bits_per_dim(torch.full((1, 2, 1, 1), 0.5)),
        lambda t: t.denoise(torch.full((1, 2, 1, 1), 0.5), 0.5),
        lambda t: t.restore(torch.full((1, 2, 1, 1), 0.5), "denoise", noise=0.1),
    ],
)
def test_what_it_cannot_do_is_one_line(workdir, use):
    with pytest.raises(ValueError, match="from one data set to another") as error:
        use(load(workdir))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampling.method": "ode"}, "'ode' .else 'field_lines'. needs noise levels"),
        ({"sampling.method": "pc"}, "'pc' .else 'field_lines'. needs noise levels"),
        ({"sampling.method": "consistency"}, "'consistency' .* needs noise levels"),
        ({"training.sde": "edm"}, "'field_lines' is for field matching"),
        ({"training.objective": "uncertainty"}, "needs an error by noise level"),
        ({"data.prior_dataset": ""}, "set data.prior_dataset"),
        ({"data.prior_dataset": "folder"}, "needs data.prior_path"),
        ({"data.num_classes": 3}, "its network is given no conditions"),
        ({"data.patch": (1, 1)}, "data.patch=.1, 1.: .* from whole images to whole images"),
        ({"efm.z_min": 5.0}, "efm.z_min must lie between 0 and efm.L"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, changes, reason):
    config = config_of(tmp_path, TINY | changes)
    with pytest.raises(ValueError, match=reason) as error:
        run_lib.train(config, tmp_path)
    assert "\n" not in str(error.value)


def test_other_data_of_the_prior_are_refused(tmp_path):
    few = {"training__n_iters": 1, "training__snapshot_freq": 1}
    assert run_lib.train(config_of(tmp_path, TINY, **few), tmp_path / "run")
    few |= {"training__n_iters": 2, "data__prior_dataset": "heart"}
    with pytest.raises(ValueError, match="the data are not those of the run"):
        run_lib.train(config_of(tmp_path, TINY, **few), tmp_path / "run")


def test_digits_of_two_classes(tmp_path):
    config = load_config("efm/digits.py")
    config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
    experiment = Experiment.build(config)
    train = experiment.data.get("train")
    prior = experiment.method.prior.images
    assert len(train) + len(experiment.data.get("test")) == 177
    assert len(prior) == pytest.approx(183 * 0.9, abs=10)
    x = methods.get_method(config).prior_sampling((5, 1, 8, 8))
    assert x.shape == (5, 1, 8, 8)
    images = experiment.codec.encode(prior[:] / 255).flatten(1)
    assert (torch.cdist(x.flatten(1), images).amin(1) < 0.02).all()


@pytest.mark.parametrize(
    ("dataset", "classes", "reason"),
    [("digits", "3,x", "not all classes of these data: 0, 1"), ("moons", "1", "have no classes")],
)
def test_classes_that_the_data_do_not_have(dataset, classes, reason):
    config = load_config("efm/digits.py")
    config.data.update(dataset=dataset, classes=classes, image_size=0, num_channels=0)
    with pytest.raises(ValueError, match=reason):
        Data(config.data).get("train")


# --- the page -------------------------------------------------------------------------------------


def test_page_of_plates(workdir, tmp_path, monkeypatch, capsys):
    for name, value in {"CHARGES": 40, "LINES": 5, "SAMPLES": 40}.items():
        monkeypatch.setattr(plates, name, value)
    picture = tmp_path / "page.png"
    monkeypatch.setattr("sys.argv", ["plates", str(workdir), "--out", str(picture)])
    plates.main()
    printed = capsys.readouterr().out
    assert "40 lines, L = 3" in printed and "exact" in printed and "learned" in printed
    with Image.open(picture) as image:
        assert image.width > 1000
    monkeypatch.setattr("sys.argv", ["toy", str(workdir), "--out", str(picture)])
    with pytest.raises(SystemExit):
        toy.main()
    assert "the likelihood needs noise levels" in capsys.readouterr().err


def test_distances_of_points_from_a_density():
    data = TOYS["moons"]()
    points = toy_points("moons", 4000).numpy()
    means, deviations, statistic, not_ended = plates.distances(points, data)
    assert max(means, deviations) < 0.05 and statistic < 1.63 / 4000**0.5  # at the level of 1 %
    assert not_ended == 0
    points[:1000] = np.nan
    assert plates.distances(points, data)[3] == 0.25
    # a shift by a tenth of the standard deviation
    std = (data.centres.var(0) + data.std**2) ** 0.5
    shifted = plates.distances(toy_points("moons", 4000).numpy() + 0.1 * std, data)
    assert shifted[0] == pytest.approx(0.1, abs=0.05)
    assert shifted[2] > statistic + 0.01
