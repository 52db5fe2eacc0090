"""Tampered files of arrays: read correctly, or refused in one line."""

import random
import re
import zipfile

import numpy as np
import pytest
from conftest import peak

from reports import page
from reports.report_file import read_report
from storage.files import cached, read_arrays, save_npz

NUMBERS = (0, -1, np.nan, np.inf, -np.inf, 1e29, -1e29, 1e30, 1e308, -1e308, 5e-324, 1 + 1e-12)
DTYPES = ("i1", "u8", "f2", "f4", "c16", "?", "U9", "S3", "M8[s]", "V4", [("a", "f4"), ("b", "?")])
SMALL = b"\x93NUMPY\x01\x00\x76\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9871,)}"


def write_entries(path, method=zipfile.ZIP_DEFLATED, **entries):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)


def mutated(arrays, chance):
    """`arrays` with one or two values, dtypes, shapes or names changed."""
    arrays = dict(arrays)
    for _ in range(chance.randint(1, 2)):
        name = chance.choice([*arrays, "other"])
        array = np.array(arrays.get(name, 1.0))
        change = chance.choice(["value", "dtype", "shape", "missing", "copied", "replaced"])
        if change == "value" and array.dtype.kind in "fc" and array.size:
            array.flat[chance.randrange(array.size)] = chance.choice(NUMBERS)
            arrays[name] = array
        elif change == "dtype":
            arrays[name] = np.zeros(array.shape, chance.choice(DTYPES))
        elif change == "shape":
            shapes = [array[None], np.resize(array, 7), np.resize(array, 1), array.ravel()[:0]]
            arrays[name] = chance.choice([*shapes, array.ravel()[0] if array.size else array])
        elif change == "missing":
            arrays.pop(name, None)
        elif change == "copied":
            arrays[name] = arrays.get(chance.choice([*arrays, "other"]), np.arange(3))
        else:
            arrays[name] = np.full(array.shape, chance.choice(NUMBERS))
    return arrays


def test_cached_files_of_another_origin_or_program_are_made_again(tmp_path):
    path, chance = tmp_path / "x.npz", random.Random(0)
    right = {"bpd": np.linspace(1, 2, 5), "nfe": 12}
    cached(path, {"seed": 1}, lambda: dict(right), right)
    original, again = read_arrays(path), 0
    for _ in range(200):
        wrong = mutated(original, chance)
        save_npz(path, **wrong)
        calls = []
        arrays = cached(path, {"seed": 1}, lambda c=calls: c.append(1) or dict(right), right)
        again += len(calls)
        same_origin = str(wrong.get("origin")) == str(original["origin"])
        assert bool(calls) != (same_origin and {"bpd", "nfe", "seconds"} <= wrong.keys())
        for name in right:
            np.testing.assert_array_equal(arrays[name], (right if calls else wrong)[name])
    assert 20 < again < 190


def test_100_damaged_cached_files_are_used_as_they_were_or_made_again(tmp_path, caplog):
    path, chance, again = tmp_path / "x.npz", random.Random(0), 0
    right = {"bpd": np.linspace(1, 2, 5), "nfe": 12}
    cached(path, {"seed": 1}, lambda: dict(right), right)
    content = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        caplog.clear()
        calls = []
        arrays = cached(path, {"seed": 1}, lambda c=calls: c.append(1) or dict(right), right)
        again += len(calls)
        assert all("\n" not in record.getMessage() for record in caplog.records)
        assert np.array_equal(arrays["bpd"], right["bpd"]) and arrays["nfe"] == 12
    assert again > 50


@pytest.fixture
def plots_are_drawn_once(monkeypatch):
    """Draw each plot once: equal arguments give an equal plot."""
    for name in ("curve_plot", "histogram"):
        draw, plots = getattr(page, name), {}

        def remembered(*args, draw=draw, plots=plots, **options):
            key = repr((args, options))
            if key not in plots:
                plots[key] = draw(*args, **options)
            return plots[key]

        monkeypatch.setattr(page, name, remembered)


def test_200_mutated_reports_are_shown_or_refused(tmp_path, plots_are_drawn_once):
    path, chance, refused = tmp_path / "report_2.npz", random.Random(1), 0
    report = {"step": 500, "seconds": 9.5, "features": "pixels", "loss": 0.25, "fid": 3.5}
    report |= {"num_samples": 99, "nonfinite": 1, "nfe": 35.0, "sampling_seconds": 2.0}
    report |= {"bpd": 3.5, "bpd_error": 0.1, "bpd_images": np.linspace(3, 4, 50), "bpd_nfe": 9.0}
    report |= {"bpd_seconds": 3.0, "encoding_error": 0.001, "nearest": 1.5, "nearest_data": 2.5}
    report |= {"fid_data": 0.5, "half_first": 99, "half_other": 200, "sampling": "{}"}
    report = {name: np.asarray(value) for name, value in report.items()}
    for _ in range(200):
        save_npz(path, **mutated(report, chance))
        try:
            mutant = read_report(path)
        except ValueError as error:
            assert re.fullmatch(rf"{re.escape(str(path))}.+", str(error))
            refused += 1
            continue
        for number in (1, 2):
            points = [(float(r["nfe"]), float(r["fid"])) for r in (report, mutant) if "nfe" in r]
            html = page.render("run", {1: report, 2: mutant}, number, distances={"": points})
            plots = re.findall("<svg.+?</svg>", html)
            assert len(plots) == html.count("<svg")
            assert not any(word in plot for plot in plots for word in ("nan", "inf"))
    assert 50 < refused < 190


def test_losses_beyond_all_measure_are_drawn():
    for numbers in ([1e29, -1e29], [5e-324, 0], [1e16, 1e16 + 2], [1e-320] * 2, NUMBERS):
        curve = [(step, number) for step, number in enumerate(numbers)]
        html = page.render("run", {1: {"step": 1, "seconds": 1}}, 1, losses={"train": curve})
        assert "loss over step" in html


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_a_bomb_takes_no_memory(method, tmp_path):
    path = tmp_path / "x.npz"
    write_entries(path, method, a=bytes(2**26 + 1))
    reason = "it unpacks to 67,108,865 bytes"
    with pytest.raises(ValueError, match=reason):
        read_arrays(path)
    assert peak(lambda: pytest.raises(ValueError, read_arrays, path)) < 2**20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("header", [SMALL, b"\x93NUMPY\x02\x00\x00\x00\x00\x04"], ids=["", "long"])
def test_a_bomb_that_claims_to_be_small_takes_no_memory(header, method, tmp_path):
    """The size in its directory is a lie, which an array's header repeats or makes worse."""
    path = tmp_path / "x.npz"
    write_entries(path, method, a=header.ljust(127) + b"\n" + bytes(2**26))
    size = (2**26 + 128).to_bytes(4, "little")
    content = path.read_bytes()
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, (9999).to_bytes(4, "little")))
    assert peak(lambda: pytest.raises(ValueError, read_arrays, path)) < 2**22


def test_what_is_no_array_is_named(tmp_path):
    path = tmp_path / "x.npz"
    write_entries(path, good=b"", a=b"bytes")
    with pytest.raises(ValueError, match=r"x\.npz is not an array file .*: good: EOF"):
        read_arrays(path)
    write_entries(path, a=b"bytes and more")
    with pytest.raises(ValueError, match=r"x\.npz is not an array file .*: a: the magic string"):
        read_arrays(path)
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="a: Object arrays cannot be loaded"):
        read_arrays(path)


def test_blank_images_are_read_back_however_small_they_pack(tmp_path):
    images = np.zeros((400, 256, 256, 3), np.uint8)
    save_npz(tmp_path / "x.npz", samples=images)
    assert read_arrays(tmp_path / "x.npz")["samples"].shape == images.shape
