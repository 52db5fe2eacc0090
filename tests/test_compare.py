"""Runs side by side: what differs, seeds together, the best marked, and the whole page."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_configs import load
from test_report import Tags, dumped
from test_small_runs import tiny

import run_lib
from configs.keys import flatten
from library import sample_folder
from reports import compare, settings
from reports.compare import compare_page
from reports.report_file import read_report
from reports.runs import Run, differing, grouped, read_run
from storage import run_config
from storage.files import save_npz, save_png
from storage.tensorboard import TensorBoardWriter

SETTINGS = {"weights": "ab", "eval.dataset": "test", "split.digest": "cd", "method": "VPSDE"}
SETTINGS |= {"eval.num_samples": 100, "eval.features": "pixels", "reference.digest": "ef"}
SETTINGS |= {"sampling.ode_solver": "heun", "sampling.N": 18, "sampling.class_label": -1}
OLD = {"seconds": 1.0, "features": np.array("pixels"), "num_samples": 100, "nonfinite": 0}


def dotted(changes):
    return {key.replace("__", "."): value for key, value in changes.items()}


def report(weights_of, values, **changes):
    """A report on the weights of a seed, with `changes` of its settings, __ for the dot."""
    origin = {"seed": weights_of, "weights": f"of {weights_of}", "step": 10}
    made_by = SETTINGS | origin | dotted(changes)
    values = {"step": made_by["step"], **OLD, **values}
    return values | {"settings": settings.to_json(made_by)}


def run(name, report=None, **changes):
    changes = dotted(changes)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, format="png")
    curves = {"loss/train": [(s, 10 / s) for s in (1, 2, 4)], "loss/test": [(4, float("nan"))]}
    config = flatten(load("vp/toy_mlp.py")) | changes
    return Run(name, config, curves, report or {}, buffer.getvalue())


@pytest.fixture
def runs():
    return [
        run("a/<1>", report(1, {"fid": 1.0, "loss": 5.0}), seed=1),
        run("a/2", report(2, {"fid": 2.0, "loss": 7.0}), seed=2),
        run("b", report(42, {"fid": 1.75, "loss": 1.0}, method="EDM"), training__sde="edm"),
        run("c", optim__lr=0.5),
    ]


def test_what_differs_and_what_is_one_setting(runs):
    groups = grouped(runs)
    assert [[r.name for r in group] for group in groups] == [["a/<1>", "a/2"], ["b"], ["c"]]
    assert differing(groups) == {
        "training.sde": ["vpsde", "edm", "vpsde"],
        "optim.lr": ["0.002", "0.002", "0.5"],
        "evaluated": ["yes", "yes", "no"],
        "evaluation: method": ["VPSDE", "EDM", ""],
    }
    assert differing(groups[:1]) == {}


def rows(page):
    """{first cell: [(text, whether it is marked)]} of all tables."""
    matches = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", page, re.DOTALL)
    cells = r"<td( class=best)?>(.*?)</td>"
    return {k: [(t, bool(b)) for b, t in re.findall(cells, v, re.DOTALL)] for k, v in matches}


def test_page_marks_the_best_mean(runs):
    page = compare_page(runs)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "a/&lt;1&gt;, a/2" in page
    assert "<1>" not in page
    table = rows(page)
    # 1.5 is the mean of 1 and 2; c has no report
    fid = [("1.500\n(1 to 2)", True), ("1.750", False), ("", False)]
    assert next(v for k, v in table.items() if k.startswith("Fréchet distance")) == fid
    # another method's loss is of another kind
    loss = next(v for k, v in table.items() if k.startswith("Loss"))
    assert [marked for _, marked in loss] == [False, False, False]
    assert "No best Loss: method differs (VPSDE; EDM)" in page
    assert table["optim.lr"] == [("0.002", False)] * 2 + [("0.5", False)]
    assert page.count('class="curve-0"') == 2  # two seeds
    assert page.count('class="curve-2"') == 1
    assert len(tags.links) == 3  # a picture for each setting


def test_seeds_alone(runs):
    page = compare_page(runs[:2])
    assert "None but the seed" in page and "(2 seeds)" in page
    assert "class=best" not in page
    assert "No run is evaluated yet" in compare_page(runs[3:])


@pytest.mark.parametrize(
    "name, value, ranked",
    [
        ("sampling.N", 2, "fid loss bpd"),
        ("sampling.guidance", 2.0, "fid loss bpd"),
        ("sampling.guide", "0123abcd", "fid loss bpd"),
        ("eval.ema_std", 0.1, "fid loss bpd"),
        ("eval.batch_size", 7, "fid loss bpd"),
        ("eval.divergence", "exact", "fid loss bpd"),
        ("seed", 7, "fid loss bpd"),
        ("step", 20, "fid loss bpd"),
        ("eval.num_samples", 1000, "loss bpd"),
        ("eval.features", "torchscript-01234567", "loss bpd"),
        ("reference.digest", "other", "loss bpd"),
        ("reference.split", "published", "loss bpd"),
        ("sampling.class_label", 3, "loss bpd"),
        ("eval.dataset", "train", "fid"),
        ("split.digest", "other", "fid"),
        ("loss.reduce_mean", True, "fid bpd"),
        ("method", "EDM", "fid bpd"),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_evaluations_of_other_settings_are_two_columns(name, value, ranked, seed):
    """Evaluations with other settings are never averaged; values of one kind are ranked."""
    worse = {"fid": 2.0, "loss": 2.0, "bpd": 2.0}
    runs = [run("a", report(1, worse), seed=1)]
    better = report(seed, dict.fromkeys(worse, 1.0), **{name.replace(".", "__"): value})
    runs.append(run("b", better, seed=seed))
    differ = differing(grouped(runs))
    texts = [str(SETTINGS.get(name, "–")), str(value)]
    texts[0] = {"seed": "the run's", "step": "10"}.get(name, texts[0])
    assert differ == {f"evaluation: {name}": texts}
    page = compare_page(runs)
    assert "seeds" not in page and "None" not in page
    assert ("the same weights, evaluated with different settings" in page) == (seed == 1)
    labels = {"fid": "Fréchet distance", "loss": "Loss", "bpd": "Bits/dim"}
    for key, label in labels.items():
        cells = next(v for k, v in rows(page).items() if k.startswith(label))
        assert cells == [("2", False), ("1", key in ranked)]
    unranked = ", ".join(labels[key] for key in ("fid", "bpd", "loss") if key not in ranked)
    reasons = re.findall(r"No best ([^:]*): (\S*) differs", page)
    assert reasons == [(unranked, name)] * bool(unranked)


def test_settings_of_the_config_that_an_evaluation_replaced():
    """Equal values of config and evaluation are one row; others have rows of their own."""
    runs = [run("a", report(1, {"fid": 1.0}), seed=1, sampling__N=18)]
    runs += [run("b", report(1, {"fid": 1.0}, sampling__N=2), seed=1, sampling__N=2)]
    assert differing(grouped(runs)) == {"sampling.N": ["18", "2"]}
    runs[1] = run("b", report(1, {"fid": 1.0}), seed=1, sampling__N=2)
    assert differing(grouped(runs)) == {"default: sampling.N": ["18", "2"]}


def test_one_seed_counts_once(runs):
    """A copied run, and a repeated training of one seed with slightly other values, are one."""
    copy = dataclasses.replace(runs[0], name="copy")
    page = compare_page([copy, runs[0], runs[1]])
    assert "(2 seeds)" in page and "1.500\n(1 to 2)" in page
    assert "copy, a/&lt;1&gt;: the same weights, with equal settings; they count once" in page
    page = compare_page([copy, runs[0]])
    assert "seeds" not in page and "but the seed" not in page and ">None.<" in page
    other = run("again", report(1, {"fid": 3.0}, weights="others"), seed=1)
    page = compare_page([runs[0], other, runs[1]])
    assert "a/&lt;1&gt;, again: one seed, with equal settings" in page
    assert "(2 seeds)" in page and "2\n(2 to 2)" in page  # the means of 1 and 3, and of 2
    cells = next(v for k, v in rows(compare_page([runs[0], other])).items() if "Fréchet" in k)
    assert cells == [("1, 3", False)]
    renamed = run("c", report(1, {"fid": 1.0}, seed=5), seed=5)  # a copy, told another seed
    assert "seeds" not in compare_page([runs[0], renamed])


def test_seeds_of_evaluations():
    """Seeds of evaluations share a column where each is its run's, or all are equal."""

    def of(*pairs):
        return [
            run(f"{k}", report(seed, {"fid": 1.0}, seed=eval_seed), seed=seed)
            for k, (seed, eval_seed) in enumerate(pairs)
        ]

    assert len(grouped(of((1, 1), (2, 2), (3, 3)))) == 1
    assert len(grouped(of((1, 2), (2, 2), (3, 2)))) == 1  # evaluated with one --config
    runs = of((1, 1), (2, 7), (3, 3), (1, 7))
    assert [[r.name for r in group] for group in grouped(runs)] == [["0", "2"], ["1", "3"]]
    assert differing(grouped(runs)) == {"evaluation: seed": ["the run's", "7"]}
    runs = of((2, 2)) + of((1, 2), (3, 2))  # two settings of a sweep, of other seeds
    runs[0] = dataclasses.replace(runs[0], values=runs[0].values | {"optim.lr": 0.5})
    assert [*differing(grouped(runs))] == ["optim.lr"]


def test_equal_values_have_no_best(runs):
    other = run("b", report(1, {"fid": 1.0}, sampling__N=2), seed=1)
    assert "class=best" not in compare_page([runs[0], other])


def test_older_reports_are_not_known(runs):
    """Older reports differ by sampler, number of samples and space; their data are unknown."""

    def old(name, seed, **changes):
        entries = {"step": 10, "fid": 1.0 * seed, "nfe": 35.0, "sampling_seconds": 1.0, **OLD}
        entries |= {"sampling": json.dumps({"ode_solver": "heun", "N": 18, "S_max": math.inf})}
        return run(name, entries | changes, seed=seed)

    page = compare_page([old("a", 1), runs[1]])
    assert rows(page)["evaluation: other settings"] == [("not known", False), ("known", False)]
    assert "seeds" not in page and "class=best" not in page
    assert "No best Fréchet distance: the data that an older report compares with are not" in page
    page = compare_page([old("a", 1), old("b", 2)])  # equal in all that they record
    assert "(2 seeds)" in page and "None" not in page
    assert rows(page)["evaluation: other settings"] == [("not known", False)]
    assert "a, b: of an older program" in page
    for changes in (
        {"sampling": json.dumps({"ode_solver": "heun", "N": 2})},
        {"num_samples": 1000},
        {"features": np.array("torchscript")},
        {"ema_std": 0.1},
        {"step": 20},
    ):
        page = compare_page([old("a", 1), old("b", 2, **changes)])
        assert "seeds" not in page and "class=best" not in page
    older = [run(name, {"step": 10, "fid": 1.0}, seed=seed) for seed, name in enumerate("ab")]
    assert "seeds" not in compare_page(older)  # nothing is known of their samplers


def test_auto_means_the_schedule_that_it_names(runs):
    old = {"step": 10, **OLD, "sampling": json.dumps({"ode_solver": "ipndm", "schedule": "auto"})}
    made_by = settings.of_report(old).values
    assert made_by["sampling.schedule"] == "polynomial"
    guided = settings.of_sampler({"guide": "a/b.pth", "order": None, "ode_solver": "heun"})
    assert guided == {
        "sampling.guide": "not known",
        "sampling.order": None,
        "sampling.ode_solver": "heun",
    }


@pytest.mark.parametrize(
    "text", ["[1]", "1", "nonsense", "[" * 10_000, '{"a": {}}', '{"a": [[]]}', f'"{"a" * 2**20}"']
)
def test_settings_that_are_none_are_refused(text, tmp_path):
    path = tmp_path / "report_1.npz"
    save_npz(path, step=1, seconds=1.0, settings=text)
    with pytest.raises(
        ValueError, match=f"{path}: the report's settings are no JSON of a flat"
    ) as e:
        read_report(path)
    assert "\n" not in str(e.value)


def test_from_workdirs_to_a_page(tmp_path, monkeypatch, capsys):
    for name, rate in (("one", 0.001), ("two", 0.1)):
        config = load("vp/toy_mlp.py")
        config.optim.lr = rate
        folder = tmp_path / name
        folder.mkdir()
        run_config.store(folder, run_config.flatten(config))
        with contextlib.closing(TensorBoardWriter(folder / "tensorboard", 0)) as writer:
            writer.add_scalars({"loss/train": rate}, 5)
        for k in (2, 10):
            save_npz(folder / f"eval/report_{k}.npz", step=100 * k, seconds=1.0, fid=rate + k)
        save_png(folder / "samples/iter_9/sample.png", np.full((8, 8, 3), 9, np.uint8))
        save_png(folder / "samples/iter_10/sample.png", np.full((8, 8, 3), 200, np.uint8))
    one = read_run(tmp_path / "one", "one", "eval")
    assert one.caption == "drawn in training, at step 10"
    assert (one.report["step"], one.curves["loss/train"][0][0]) == (1000, 5)
    assert np.asarray(Image.open(io.BytesIO(one.picture))).max() == 200
    out = tmp_path / "page.html"
    command = ["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    compare.main()
    assert rows(out.read_text())["optim.lr"] == [("0.001", False), ("0.1", False)]
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "none"), "--out", str(out)])
    with pytest.raises(SystemExit):
        compare.main()
    assert "none carries a config" in capsys.readouterr().err
    assert "2 runs side by side" in dumped(out, tmp_path)


# --- evaluations as they are ----------------------------------------------------------------------

SAMPLES_ONLY = {"eval.enable_loss": False, "eval.num_samples": 12, "eval.batch_size": 12}


class Scaled(torch.nn.Module):
    """Features are the mean of each channel, by a weight."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return self.weight * x.float().mean((2, 3)) + x[:, :, 0, 0]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A function that evaluates a copy of one small run, and reads it: (name, **overrides)."""
    folder = tmp_path_factory.mktemp("runs")
    averages = {"model__ema_stds": (0.05, 0.1), "training__snapshot_freq": 2}
    config = tiny("edm/digits_ddpmpp.py", folder, training__n_iters=8, **averages)
    config.update_from_flattened_dict(SAMPLES_ONLY | {"training.snapshot_sampling": False})
    config.eval.update(steps="", begin_ckpt=4, end_ckpt=4)
    assert run_lib.train(config, folder / "run")

    def evaluate(name, **overrides):
        shutil.copytree(folder / "run", folder / name)
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(dotted(overrides))
        run_lib.evaluate(changed, folder / name)
        return read_run(folder / name, name, "eval")

    evaluate.folder = folder
    return evaluate


def test_evaluations_of_a_copied_run(evaluated):
    """Each setting that is changed is the one that differs, and nothing is averaged."""
    folder = evaluated.folder
    first, copy = evaluated("first"), evaluated("copy", sampling__seeds="0-9")
    assert [len(group) for group in grouped([first, copy])] == [2]
    page = compare_page([first, copy])
    assert "first, copy: the same weights, with equal settings" in page
    assert "seed" not in "".join(re.findall("<h2>Settings.*?</p>", page))

    for weight in (1, 2):
        torch.jit.script(Scaled(weight)).save(str(folder / f"{weight}.pt"))
    published = folder / "published/digits_stats.npz"
    save_npz(published, mu=np.zeros(64), sigma=np.eye(64))
    script = {"eval__features": "torchscript", "eval__inception_path": str(folder / "1.pt")}
    guide = str(folder / "run/checkpoints/checkpoint_2.pth")
    runs = {
        "steps": ("sampling.N", {"sampling__N": 3}),
        "number": ("eval.num_samples", {"eval__num_samples": 14}),
        "batches": ("eval.batch_size", {"eval__batch_size": 10}),
        "ema": ("eval.ema_std", {"eval__ema_std": 0.075}),
        "space": ("eval.features", script),
        "data": ("reference.", {"eval__stats_dir": str(published.parent)}),
        "guidance": ("sampling.guid", {"sampling__guidance": 2.0, "sampling__guide": guide}),
        "seed": ("seed", {"seed": 7}),
    }
    evaluations = {name: evaluated(name, **overrides) for name, (_, overrides) in runs.items()}
    for name, (setting, _) in runs.items():
        pair = [first, evaluations[name]]
        assert [len(group) for group in grouped(pair)] == [1, 1]
        assert all(key.startswith(f"evaluation: {setting}") for key in differing(grouped(pair)))
        page = compare_page(pair)
        ranked = name not in ("number", "space", "data")
        differ = re.findall(r"No best [^<]* differs", page)
        assert ("class=best" in page, bool(differ)) == (ranked, not ranked), name
    script["eval__inception_path"] = str(folder / "2.pt")
    pair = [evaluations["space"], evaluated("other space", **script)]
    assert [*differing(grouped(pair))] == ["evaluation: eval.features"]
    assert len(grouped([first, *evaluations.values()])) == 1 + len(runs)


def test_a_workdir_named_twice_is_shown_once(evaluated, tmp_path, monkeypatch, capsys):
    evaluated("named")
    (tmp_path / "link").symlink_to(evaluated.folder / "named")
    workdirs = [evaluated.folder / "named", tmp_path / "link"]
    out = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["compare", *map(str, workdirs), "--out", str(out)])
    compare.main()
    assert "named is named more than once, and shown once" in capsys.readouterr().out
    assert "1 run side by side" in out.read_text()
    assert "named is named more than once" in out.read_text()


def test_a_report_has_all_that_made_it(evaluated):
    """Flat, readable without unpickling, and with what `auto` and None stand for."""
    run = evaluated("whole", sampling__ode_solver="unipc", eval__enable_loss=True)
    text = str(np.load(evaluated.folder / "whole/eval/report_4.npz")["settings"])
    made_by = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    expected = {
        "step": 8,
        "seed": run.values["seed"],
        "eval.ema_std": 0.0,
        "eval.num_samples": 12,
        "eval.features": "pixels",
        "eval.dataset": "test",
        "split.data": "digits",
        "split.images": 180,
        "reference.data": "digits",
        "reference.split": "train",
        "reference.images": 1617,
        "sampling.N": 2,
        "sampling.schedule": "polynomial",
        "sampling.order": 3,
        "sampling.guidance": 1.0,
        "method": "EDM",
        "method.D": "inf",
        "loss.reduce_mean": False,
    }
    assert {name: made_by.get(name) for name in expected} == expected
    assert "eval.divergence" not in made_by  # no likelihood was asked for
    sampler = {key for key in run.values if key.startswith("sampling.")}
    unread = {*sample_folder.KEYS, "sampling.size"}  # read by --mode sample alone
    unread |= {key for key in sampler if key.startswith(("sampling.restore", "sampling.init"))}
    assert sampler - made_by.keys() == unread
