"""Pairs: the data of conditions, matched with their images, and passed to a network."""

import logging

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image
from test_configs import load

import datasets
import losses
import methods
import models
import run_lib
from completion import complete
from library.conditions import ConditionDrawer
from reports import drawings
from sources.batch import Batch, Conditions
from sources.codec import EightBitImages
from sources.pairs import codec_of, read_conditions
from sources.preparation import Preparation

SIDE = 8
TINY = {
    "data.image_size": 0,
    "data.num_workers": 0,
    "training.target": "image",
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.num_res_blocks": 1,
    "training.batch_size": 8,
    "training.small_batch_size": 0,
}


def config_of(images, conditions, of="pfgmpp/images16_ddpmpp.py", **values):
    config = load(of)
    paths = {"data.path": str(images), "data.condition_path": str(conditions)}
    values = {key.replace("__", "."): value for key, value in values.items()}
    with config.ignore_type():
        config.update_from_flattened_dict(TINY | paths | values)
    return config


def completed(*places, **values) -> ConfigDict:
    return complete(config_of(*places, **values))[0]


def numbered(n, channels=1, start=0):
    """Bytes (n, SIDE, SIDE, C), all of image i its number."""
    return np.full((n, SIDE, SIDE, channels), 0, np.uint8) + np.uint8(
        start + np.arange(n)[:, None, None, None]
    )


def save_16_bits(folder, values):
    """PNGs scan0, scan1, ... of values (n, H, W, 1)."""
    folder.mkdir()
    for i, image in enumerate(values.astype(np.uint16)):
        Image.fromarray(image[..., 0]).save(folder / f"scan{i}.png")
    return folder


def save_pngs(folder, images, names):
    folder.mkdir()
    for image, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / name)
    return folder


@pytest.fixture
def two_classes(tmp_path):
    """Folders of 20 images of the classes a (even numbers) and b, and of equal conditions."""
    names = [f"{'ab'[i % 2]}/scan{i}.png" for i in range(20)]
    images = numbered(20, start=100)
    return [save_pngs(tmp_path / name, images, names) for name in ("clean", "noisy")]


@pytest.fixture
def arrays(tmp_path):
    """Float arrays: images whose entries are their number, conditions 100 and -3 times that."""
    numbers = np.arange(40, dtype=np.float32)[:, None, None, None]
    np.save(tmp_path / "x.npy", numbers + np.zeros((40, SIDE, SIDE, 1), np.float32))
    scales = np.array([100, -3], np.float32)
    np.save(tmp_path / "c.npy", numbers * scales + np.zeros((40, SIDE, SIDE, 2), np.float32))
    return tmp_path / "x.npy", tmp_path / "c.npy"


@pytest.fixture
def folders(tmp_path):
    """Folders of 20 images: conditions are 100 more, named alike but for suffix and order."""
    names = [f"scan{i}.png" for i in range(20)]
    images = save_pngs(tmp_path / "clean", numbered(20), names)
    others = [name.replace("png", "bmp") for name in names]
    return images, save_pngs(tmp_path / "noisy", numbered(20, start=100), others)


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident_bytes", [0, 2**31])
def test_conditions_of_arrays_belong_to_their_images(arrays, resident_bytes):
    config = completed(*arrays, data__resident_bytes=resident_bytes)
    data, train = config.data, np.load(arrays[1])
    of_conditions = {key: data[f"condition_{key}"] for key in ("channels", "dtype")}
    assert of_conditions == {"channels": 2, "dtype": "float32"}
    batch_numbers = []
    for split in datasets.SPLITS:
        part = datasets.Data(config.data).get(split)
        batch = datasets.batch_at(part, slice(None))
        numbers = batch.images[:, 0, 0, 0].long()
        batch_numbers += numbers.tolist()
        mean, std = (
            torch.tensor(data[f"condition_{key}"]).view(-1, 1, 1) for key in ("mean", "std")
        )
        stored = torch.from_numpy(train).permute(0, 3, 1, 2)[numbers]
        torch.testing.assert_close(batch.conditions["image"], (stored - mean) * 0.5 / std)
        if split == "train":
            rows = stored.double().transpose(0, 1).flatten(1)
            torch.testing.assert_close(rows.mean(1), mean.flatten().double(), check_dtype=False)
            deviation = rows.std(1, correction=0)
            torch.testing.assert_close(deviation, std.flatten().double(), check_dtype=False)
    assert sorted(batch_numbers) == list(range(40))


def test_conditions_in_folders_are_matched_by_name(folders):
    config = completed(*folders, data__held_out=0.25)
    assert config.data.condition_mean == (127.5,) and config.data.condition_dtype == "uint8"
    for split in datasets.SPLITS:
        batch = datasets.batch_at(datasets.Data(config.data).get(split), slice(None))
        expected = (batch.images.float() + 100) / 127.5 - 1
        torch.testing.assert_close(batch.conditions["image"], expected)


@pytest.mark.parametrize("held_out", [0, 4])
def test_conditions_of_the_classes_that_are_taken(two_classes, held_out):
    config = completed(*two_classes, data__classes="b", data__held_out=held_out)
    batch = datasets.batch_at(datasets.Data(config.data).get("train"), slice(None))
    numbers = batch.images[:, 0, 0, 0].tolist()
    assert len(numbers) >= 10 - held_out and all(number % 2 for number in numbers)
    expected = batch.images.float() / 127.5 - 1
    torch.testing.assert_close(batch.conditions["image"], expected)


def test_an_array_of_conditions_belongs_to_a_folder_by_order(folders, tmp_path):
    names = sorted(f"scan{i}" for i in range(20))
    order = [int(name.removeprefix("scan")) for name in names]
    np.save(tmp_path / "c.npy", numbered(20)[order].astype(np.float32))
    config = completed(folders[0], tmp_path / "c.npy", data__held_out=5)
    batch = datasets.batch_at(datasets.Data(config.data).get("test"), slice(None))
    mean, std = config.data.condition_mean[0], config.data.condition_std[0]
    expected = (batch.images.float() - mean) * 0.5 / std
    torch.testing.assert_close(batch.conditions["image"], expected)


def test_splits_of_arrays_have_their_own_conditions(tmp_path):
    parts = {"train": numbered(9), "test": numbered(4, start=50)}
    np.savez(tmp_path / "x.npz", **parts)
    np.savez(tmp_path / "c.npz", **{name: 2 * part for name, part in parts.items()})
    config = completed(tmp_path / "x.npz", tmp_path / "c.npz")
    for split in datasets.SPLITS:
        batch = datasets.batch_at(datasets.Data(config.data).get(split), slice(None))
        expected = 2 * batch.images.float() / 127.5 - 1
        torch.testing.assert_close(batch.conditions["image"], expected)
    np.save(tmp_path / "whole.npy", numbered(13))
    with pytest.raises(ValueError, match="only the images have splits of their own"):
        completed(tmp_path / "x.npz", tmp_path / "whole.npy")


def test_an_unreadable_condition_takes_its_image_along(folders, caplog):
    (folders[1] / "scan7.bmp").write_bytes(b"no image")
    config = completed(*folders, data__held_out=0)
    data = datasets.Data(config.data).get("train")
    assert len(data) == 19 and 7 not in data.images[:, 0, 0, 0].tolist()
    assert "unreadable image" in caplog.text


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_conditions_that_do_not_fit_are_refused_in_one_line(arrays, folders, tmp_path):
    few = tmp_path / "few.npy"
    np.save(few, np.zeros((39, SIDE, SIDE, 1), np.float32))
    with pytest.raises(ValueError, match="holds 39 conditions for 40 images") as error:
        completed(arrays[0], few)
    one_line(error)
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((40, 6, SIDE, 1), np.float32))
    sides = r"has conditions of 6 x 8 pixels, and the images have 8 x 8 \(data.image_size\)"
    with pytest.raises(ValueError, match=sides) as error:
        completed(arrays[0], other)
    one_line(error)
    (folders[1] / "scan3.bmp").rename(folders[1] / "scan33.bmp")
    with pytest.raises(ValueError, match="has no file called 'scan3'") as error:
        completed(*folders)
    one_line(error)
    with pytest.raises(FileNotFoundError, match="data.condition_path=.*gone does not exist"):
        completed(arrays[0], tmp_path / "gone")
    bad = np.load(arrays[1])
    bad[3, 2, 1, 0] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(ValueError, match=r"bad.npy\[3, 2, 1, 0\] is nan"):
        completed(arrays[0], tmp_path / "bad.npy")
    (folders[1] / "scan33.bmp").rename(folders[1] / "scan3.bmp")
    deep = save_16_bits(tmp_path / "deep", np.full((20, SIDE, SIDE, 1), 300))
    with pytest.raises(ValueError, match="deep holds 16-bit images: .* set data.scale") as error:
        completed(folders[0], deep, data__condition_dtype="uint8")
    one_line(error)
    with pytest.raises(ValueError, match="300 to 300, are not of the type int8 .*condition_dtype"):
        completed(folders[0], deep, data__condition_dtype="int8")
    for key in ("data.condition_mean", "data.condition_std"):
        config = completed(*folders, **{key: (9.0,)})
        line = rf"{key}=\(9.0,\) is for conditions in units of their own, but these are images of 8"
        with pytest.raises(ValueError, match=line) as error:
            codec_of(config.data)
        one_line(error)
    digits = config_of(*arrays, data__dataset="digits", data__image_size=8)
    with pytest.raises(ValueError, match="belongs to the images of data.dataset='folder'"):
        complete(digits)


def test_a_line_says_where_16_bit_conditions_are_clipped(tmp_path):
    values = np.arange(20)[:, None, None, None] + np.zeros((20, SIDE, SIDE, 1))
    places = [
        save_16_bits(tmp_path / "clean", 1000 + values),
        save_16_bits(tmp_path / "noisy", 1500 + values),
    ]
    lines = {scale: complete(config_of(*places, data__scale=scale))[2] for scale in ((), (0, 2047))}
    of_pairs = [[line for line in each if "conditions: " in line] for each in lines.values()]
    assert "clipped at 1023, though they reach 2047: widen data.scale" in of_pairs[0][0]
    assert "clipped" not in of_pairs[1][0]


@pytest.mark.parametrize("of_images, condition_dtype", [("8", ""), ("own", ""), ("16", "int32")])
def test_16_bit_files_in_units_of_their_own_are_conditions_as_their_array_is(
    tmp_path, of_images, condition_dtype
):
    """Where the data do not become 8 bits by a `data.scale`, or a type is named."""
    values = np.random.default_rng(0).integers(0, 2**16, (20, SIDE, SIDE, 1))
    order = sorted(range(20), key=lambda i: f"scan{i}.png")  # of the files
    files = save_16_bits(tmp_path / "deep", values)
    np.save(tmp_path / "c.npy", values[order].astype(np.float32))
    images = tmp_path / "clean"
    if of_images == "8":
        save_pngs(images, numbered(20), [f"scan{i}.png" for i in range(20)])
    else:
        save_16_bits(images, values // 2)
    dtype = {"data.dtype": "uint16" if of_images == "own" else "", "data.held_out": 5}
    of_files = dtype | {"data.condition_dtype": condition_dtype}
    configs = completed(images, files, **of_files), completed(images, tmp_path / "c.npy", **dtype)
    assert configs[0].data.condition_dtype == (condition_dtype or "uint16")
    for split in datasets.SPLITS:
        parts = [datasets.Data(config.data).get(split) for config in configs]
        rows = [datasets.batch_at(part, slice(None)).conditions["image"] for part in parts]
        assert len(rows[0]) == (15 if split == "train" else 5)
        torch.testing.assert_close(*rows)

    codec = codec_of(configs[0].data)
    read = read_conditions("sampling.condition", str(files), codec, (), "nhwc")
    assert [*read] == [f"scan{i}.png" for i in order]
    assert all((read[f"scan{i}.png"] == values[i]).all() for i in range(20))
    one = read_conditions("sampling.condition", str(files / "scan3.png"), codec, (), "nhwc")
    assert (one["scan3.png"] == values[3]).all()


def test_conditions_are_part_of_the_identity_of_data(arrays):
    config = completed(*arrays)
    stored = datasets.Data(config.data).identity
    changed = np.load(arrays[1])
    changed[5] += 1
    np.save(arrays[1], changed)
    with pytest.raises(datasets.DataChanged, match="other contents"):
        datasets.Data(config.data, stored).get("train")


# --- training -------------------------------------------------------------------------------------


def spatial_batch(n=64, side=SIDE):
    """A batch whose condition is the image itself, encoded."""
    images = torch.randint(256, (n, 1, side, side), dtype=torch.uint8)
    return Batch(images, Conditions(image=2 * (images.float() / 255) - 1))


@pytest.mark.parametrize("augment", [0.0, 0.5])
def test_a_condition_moves_with_its_image(augment):
    prepare = Preparation(EightBitImages((1, SIDE, SIDE)), flips=not augment, augment=augment)
    stored = spatial_batch()
    batch = prepare(stored, torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.conditions["image"], batch.images)
    assert not torch.equal(batch.images, 2 * (stored.images.float() / 255) - 1)


def test_patches_of_a_condition_lie_where_those_of_its_image_do(arrays):
    prepare = Preparation(EightBitImages((1, 3, 4)))
    batch = prepare(spatial_batch(), torch.Generator().manual_seed(0))
    assert batch.images.shape == (64, 1, 3, 4)
    torch.testing.assert_close(batch.conditions["image"], batch.images)

    ramp = np.arange(40 * SIDE * SIDE, dtype=np.float32).reshape(40, SIDE, SIDE, 1)
    for path in arrays:
        np.save(path, ramp)
    config = completed(*arrays, data__patch=(4, 4), data__num_channels=1)
    data = datasets.Data(config.data)
    batch = datasets.batch_at(data.get("test"), slice(None))
    mean, std = config.data.condition_mean[0], config.data.condition_std[0]
    torch.testing.assert_close(batch.conditions["image"], (batch.images - mean) * 0.5 / std)
    rows = torch.arange(4)
    torch.testing.assert_close(data.paired("test", rows), batch.conditions["image"])


@pytest.mark.parametrize("shares", [(0.2, 0.2), (0.2, 0.4), (0.4, 0.2)])
def test_the_smaller_share_of_examples_loses_label_and_condition(arrays, shares):
    """Frequencies of what is lost: both, the smaller share; one alone, the difference; and none."""
    config, n = completed(*arrays), 4000
    batch = Batch(
        torch.zeros(n, 1, 2, 2),
        Conditions(class_labels=torch.ones(n).long(), image=torch.ones(n, 2, 2, 2)),
    )
    label, condition = shares
    config.training.update(label_dropout=label, condition_dropout=condition, batch_size=n)
    objective = losses.get_loss_fn(config, methods.get_method(config))
    conditions = objective.draw(batch, 0, torch.Generator().manual_seed(0)).conditions
    no_label = conditions["class_labels"] < 0
    no_image = (conditions["image"] == 0).flatten(1).all(1)
    for lost, share in (
        (no_label & no_image, min(shares)),
        (no_label & ~no_image, max(label - condition, 0)),
        (no_image & ~no_label, max(condition - label, 0)),
    ):
        deviation = (share * (1 - share) / n) ** 0.5
        assert abs(lost.double().mean().item() - share) <= 4 * deviation
    assert ((conditions["image"] == 0) | (conditions["image"] == 1)).all()
    whole = objective.whole().draw(batch, 0).conditions
    assert (whole["image"] == 1).all() and (whole["class_labels"] == 1).all()


@pytest.mark.parametrize("name", ["ncsnpp", "edm_unet", "adm", "ddpm"])
@pytest.mark.parametrize("progressive_input", ["none", "residual", "input_skip"])
def test_every_u_net_is_given_the_condition(arrays, name, progressive_input):
    if name in ("ddpm", "adm") and progressive_input != "none":
        pytest.skip("it has none")
    fir = {"model__fir": True} if progressive_input != "none" else {}
    config = completed(*arrays, model__name=name, model__init_scale=1.0, **fir)
    config.model.progressive_input = progressive_input
    net = models.create_model(config).eval()
    if name == "adm":  # its last weights are 0 at the start
        torch.nn.init.normal_(net.head.conv.weight)
    x, label = torch.randn(2, 1, SIDE, SIDE), torch.ones(2)
    image = torch.randn(2, 2, SIDE, SIDE)
    none, zero = net(x, label), net(x, label, image=torch.zeros_like(image))
    assert none.shape == x.shape and torch.equal(none, zero)
    assert not torch.allclose(net(x, label, image=image), none)
    first = net(x[:1], label[:1], image=image[:1])
    torch.testing.assert_close(net(x, label, image=image)[:1], first)


def test_networks_methods_and_codecs_without_conditions_are_refused(arrays):
    config = completed(*arrays)
    config.model.name = "mlp"
    with pytest.raises(ValueError, match="model.name='mlp' takes no image as a condition"):
        models.create_model(config)
    config = completed(*arrays)
    config.data.condition_mean = (0.0,)
    with pytest.raises(ValueError, match="must have 2 numbers each"):
        codec_of(config.data)
    config = load("pfgmpp/digits_ddpmpp.py")
    net = models.create_model(config)
    with pytest.raises(ValueError, match="the network takes no image"):
        net(torch.zeros(1, 1, 8, 8), torch.ones(1), image=torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("of", ["poisson/images32_ddpmpp.py", "pfgmpp/images16_ddpmpp.py"])
def test_targets_that_average_over_other_conditions_are_refused(arrays, of, caplog):
    from experiment import Experiment

    caplog.set_level(logging.WARNING)
    config = completed(*arrays, of=of, training__target="posterior_mean")
    with pytest.raises(ValueError, match="means over images of other conditions") as error:
        Experiment.build(config)
    one_line(error)


def test_a_coupling_and_an_image_as_a_condition_are_refused_together(arrays):
    from experiment import Experiment

    config = completed(*arrays, model__coupling="transport")
    with pytest.raises(ValueError, match="data.condition_path needs noise that is independent"):
        Experiment.build(config)


def test_a_guide_is_given_conditions_on_the_same_scale(arrays, tmp_path):
    from experiment import Experiment

    config = completed(*arrays, training__snapshot_sampling=False, training__n_iters=1)
    run_lib.train(config, tmp_path / "run")
    guide = str(tmp_path / "run/checkpoints/checkpoint_1.pth")
    config.sampling.update(guidance=2.0, guide=guide)
    assert Experiment.build(config).sampler.guidance.guide is not None
    config.data.condition_std = (1.0, 1.0)
    with pytest.raises(ValueError, match="the codec of its conditions is") as error:
        Experiment.build(config)
    one_line(error)


def test_labels_alone_do_not_stand_for_the_image_that_is_missing(arrays):
    config = completed(*arrays)
    with config.ignore_type():
        config.data.update(condition_path="", num_classes=2)
    drawer = ConditionDrawer(datasets.Data(config.data), torch.device("cpu"))
    with pytest.raises(ValueError, match="data.condition_path names none"):
        drawer(2, "samples")


def test_samples_of_a_named_class_have_conditions_of_its_images(two_classes):
    config = completed(*two_classes, data__num_classes=2, data__held_out=4)
    data = datasets.Data(config.data)
    for label in (0, 1):
        drawer = ConditionDrawer(data, torch.device("cpu"), class_label=label)
        conditions = drawer(50, "samples")
        numbers = ((conditions["image"][:, 0, 0, 0] + 1) * 127.5).round().long() - 100
        assert (conditions["class_labels"] == label).all()
        assert (numbers % 2 == label).all() and len(numbers.unique()) > 3
    with pytest.raises(ValueError, match="class_label=7: no training image is of this class") as no:
        ConditionDrawer(data, torch.device("cpu"), class_label=7)(2, "samples")
    one_line(no)


def test_the_picture_of_classes_is_drawn_with_a_condition(two_classes, tmp_path, monkeypatch):
    from experiment import Experiment

    config = completed(*two_classes, data__num_classes=2)
    strips = []
    monkeypatch.setattr(drawings, "_draw_strips", lambda *arguments: strips.append(arguments[-1]))
    drawings.draw_classes(Experiment.build(config), 0, tmp_path / "classes.png")
    (conditions,) = strips
    assert conditions["class_labels"].tolist() == [0, 1]
    assert conditions["image"].shape == (2, 1, SIDE, SIDE)
    assert (conditions["image"][0] == conditions["image"][1]).all()


def test_guidance_by_the_condition_needs_its_dropout(arrays):
    from experiment import Experiment

    config = completed(*arrays, sampling__guidance=2.0)
    with pytest.raises(ValueError, match="training.condition_dropout above 0"):
        Experiment.build(config)
    config.training.condition_dropout = 0.1
    assert Experiment.build(config).sampler.guidance.weight == 2
