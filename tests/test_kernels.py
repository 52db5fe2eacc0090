"""The CUDA kernels without a GPU: run on the host against their definition, and compiled by nvcc.

The host's compiler gets the sources of op/ as they are, but for the syntax of launches, with the
headers of tests/host in place of CUDA's and both sanitizers.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT, run_program

OP, HOST = ROOT / "op", ROOT / "tests/host"
SOURCES = ("upfirdn2d.cu", "fused_leaky_relu.cu")
UPFIRDN2D = (SOURCES[0], "upfirdn2d.h")  # the second has the arithmetic
CALLS = 2700  # for each kernel
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = range(4)  # numbered as in op/kernels.h
KINDS = (np.float16, np.float32, np.float32, np.float64)  # numpy has no bfloat16
EPS = (2.0**-11, 2.0**-8, 2.0**-24, 2.0**-53)  # the largest relative error of one rounding
SUM_EPS = (2.0**-24, 2.0**-24, 2.0**-24, 2.0**-53)  # EPS of the dtype in which sums are taken

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


class Call(NamedTuple):
    """A call as tests/host/main.cpp reads it, and the output that its definition gives."""

    header: list[float]
    tensors: list[bytes]
    expected: np.ndarray
    dtype: int
    error: float  # absolute, of the arithmetic before the result is rounded


def stored(values: np.ndarray, dtype: int) -> tuple[bytes, np.ndarray]:
    """`values` in the dtype: its bytes, and the numbers that these stand for, in float64."""
    data = values.astype(KINDS[dtype]).tobytes()
    if dtype == BFLOAT16:
        data = np.frombuffer(data, np.uint16)[1::2].tobytes()  # the upper halves
    return data, loaded(data, dtype).reshape(values.shape)


def loaded(data: bytes, dtype: int) -> np.ndarray:
    """The numbers that the bytes stand for, in float64."""
    if dtype == BFLOAT16:
        data = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).tobytes()
    return np.frombuffer(data, KINDS[dtype]).astype(np.float64)


def numbers(rng: np.random.Generator, *shape: int, wild: bool) -> np.ndarray:
    """Standard normal numbers; with `wild`, one in eight is replaced by an infinity or NaN."""
    values = rng.standard_normal(shape)
    if wild:
        where = rng.random(shape) < 1 / 8
        values[where] = rng.choice([np.inf, -np.inf, np.nan], where.sum())
    return values


def largest(values: np.ndarray) -> float:
    """Largest magnitude among the finite values."""
    return np.abs(values[np.isfinite(values)]).max(initial=0)


def slow_upfirdn2d(x, kernel, size, up, down, pad):
    """The definition for planes, tap by tap: a tap that meets no pixel takes no part in the sum."""
    out = np.zeros((len(x), *size))
    for taps in np.ndindex(*kernel.shape):
        met, pixels = [], []
        for axis in range(2):
            # where the tap lies on the plane with zeros inserted: a convolution runs backwards
            place = np.arange(size[axis]) * down[axis] - pad[axis]
            place += kernel.shape[axis] - 1 - taps[axis]
            pixel, between = np.divmod(place, up[axis])
            inside = (between == 0) & (pixel >= 0) & (pixel < x.shape[1 + axis])
            met.append(inside.nonzero()[0])
            pixels.append(pixel[inside])
        rows, columns = np.ix_(*met)
        out[:, rows, columns] += kernel[taps] * x[:, *np.ix_(*pixels)]
    return out


def upfirdn2d_call(rng, dtype, planes, size, out, taps, up, down, pad, offset=0, wild=False):
    data, x = stored(numbers(rng, planes, *size, wild=wild), dtype)
    wild = wild and rng.random() < 0.2  # else nearly every output would be NaN
    filter_dtype = max(dtype, FLOAT32)
    filter_data, kernel = stored(numbers(rng, *taps, wild=wild), filter_dtype)
    with np.errstate(invalid="ignore"):
        expected = slow_upfirdn2d(x, kernel, out, up, down, pad)
    error = 2 * kernel.size * SUM_EPS[dtype] * kernel.size * largest(x) * largest(kernel)
    header = [0, dtype, planes, *size, *out, *taps, *up, *down, *pad, offset]
    return Call(header, [data, filter_data], expected, dtype, error)


def random_upfirdn2d_call(rng, dtype):
    taps, (up, down) = rng.integers(1, 7, 2), rng.integers(1, 4, (2, 2))
    if rng.random() < 0.6:  # filters of the networks
        taps[:], (up[:], down[:]) = 4, ((1, 1), (2, 1), (1, 2))[rng.integers(3)]
    pad = rng.integers(-4, 10, 2)
    if rng.random() < 0.02:
        pad[rng.integers(2)] += rng.choice([-1, 1]) * 2**29  # all of the image is elsewhere
    size, out = rng.integers(1, 12, (2, 2))
    options = {"offset": rng.integers(4), "wild": rng.random() < 1 / 3}
    return upfirdn2d_call(rng, dtype, rng.integers(1, 6), size, out, taps, up, down, pad, **options)


def leaky_relu_call(
    rng, dtype, shape, slope=0.2, scale=2**0.5, gradient=False, offsets=(0, 0, 0), wild=False
):
    data, x = stored(numbers(rng, *shape, wild=wild), dtype)
    bias_data, bias = stored(numbers(rng, shape[1], wild=wild and rng.random() < 0.2), dtype)
    grad_data, grad = stored(numbers(rng, *shape, wild=wild), dtype)
    with np.errstate(invalid="ignore"):
        biased = x + bias[:, None]
        passed = grad if gradient else biased
        expected = np.where(biased > 0, passed * scale, passed * slope * scale)
    error = 8 * SUM_EPS[dtype] * (largest(x) + largest(bias) + largest(grad)) * 2 * abs(scale)
    header = [1, dtype, *shape, slope, scale, gradient, *offsets, *[0] * 5]
    return Call(header, [data, bias_data, *[grad_data] * gradient], expected, dtype, error)


def random_leaky_relu_call(rng, dtype):
    return leaky_relu_call(
        rng,
        dtype,
        (*rng.integers(1, 5, 2), rng.choice([1, 3, 4, 8, 9, 16, 24])),
        slope=rng.choice([0.2, 0.7, -0.5, 0.0, 1.0]),
        scale=rng.choice([2**0.5, 1.0, -1.5]),
        gradient=rng.random() < 0.5,
        offsets=rng.integers(4, size=3) * (rng.random(3) < 0.3),
        wild=rng.random() < 1 / 3,
    )


def random_calls(number: int, make, seed: int) -> list[Call]:
    rng = np.random.default_rng(seed)
    return [make(rng, i % 4) for i in range(number)]


def large_upfirdn2d_calls() -> list[Call]:
    """More columns than a block, and more planes than the threads of a launch."""
    rng, none = np.random.default_rng(2), (0, 0)
    wide = ((300, 37), (600, 74), (4, 4), (2, 2), (1, 1), (2, 2))
    many = ((1, 1), (1, 1), (1, 2), (1, 1), (1, 1), (0, 1))
    odd = ((9, 301), (5, 301), (3, 1), (1, 1), (2, 1), none)
    planes = ((3, wide), (256 * 8192 + 3, many), (2, odd))
    return [upfirdn2d_call(rng, FLOAT32, n, *shapes) for n, shapes in planes]


def large_leaky_relu_calls() -> list[Call]:
    """More numbers than the threads of a launch take in one round."""
    return [leaky_relu_call(np.random.default_rng(3), FLOAT32, (1, 3, 256 * 8192 // 3 + 5))]


class Kernel(NamedTuple):
    source: str
    random: list[Call]
    large: list[Call]


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    """Kernels with their test calls, by name of the source."""
    pair = (
        Kernel(SOURCES[0], random_calls(CALLS, random_upfirdn2d_call, 0), large_upfirdn2d_calls()),
        Kernel(
            SOURCES[1], random_calls(CALLS, random_leaky_relu_call, 1), large_leaky_relu_calls()
        ),
    )
    return {kernel.source: kernel for kernel in pair}


def compile_for_host(*arguments: str | Path) -> None:
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run_program(["c++", "-std=c++17", f"-I{HOST}", *sanitizers, *arguments])


def compile_kernel(op: Path, source: str, target: Path, flags: list[str]) -> Path:
    """The object file `target` of a source in the folder `op`."""
    launch = r"(\w+(?:<[\w, ]+>)?)<<<(.+?)>>>\("
    text, launches = re.subn(
        launch, r"launch_on_host(\1, \2)(", (op / source).read_text(), flags=re.S
    )
    assert launches == 1
    target.with_suffix(".cpp").write_text(text)
    compile_for_host(*flags, f"-I{op}", "-c", target.with_suffix(".cpp"), "-o", target)
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """Object files of the program and of the kernels as they are, by name of the source."""
    folder = tmp_path_factory.mktemp("host")
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    main = folder / "main.o"
    compile_for_host(*flags, f"-I{OP}", "-c", HOST / "main.cpp", "-o", main)
    return {"main.cpp": main} | {
        name: compile_kernel(OP, name, folder / f"{name}.o", flags) for name in SOURCES
    }


def link(objects: dict[str, Path], program: Path) -> Path:
    compile_for_host(*objects.values(), "-o", program)
    return program


def fault_of(program: Path, calls: list[Call]) -> str | None:
    """The first fault in the outputs of the program, None where each is as defined."""
    words = b"".join(
        b"".join([np.array(call.header, np.float64).tobytes(), *call.tensors]) for call in calls
    )
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], input=words, capture_output=True, env=environment, timeout=120)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        return next(
            (line for line in lines if "error" in line.lower()), f"status {done.returncode}"
        )
    begin = 0
    for call in calls:
        end = begin + call.expected.size * (2, 2, 4, 8)[call.dtype]
        output = loaded(done.stdout[begin:end], call.dtype).reshape(call.expected.shape)
        begin, expected = end, call.expected
        finite = np.isfinite(expected)
        if not np.array_equal(output[~finite], expected[~finite], equal_nan=True):
            return f"NaN or infinities differ: {call.header}"
        error = np.abs(output[finite] - expected[finite])
        subnormal = 2.0**-25 if call.dtype == FLOAT16 else 0.0  # error of rounding to one
        bound = call.error + EPS[call.dtype] * np.abs(expected[finite]) + subnormal
        if not (error <= bound).all():
            return f"off by {(error / bound).max():.3g} times the bound: {call.header}"
    return None if begin == len(done.stdout) else "outputs are too long"


@needs_compiler
def test_kernels_compute_as_defined(kernels, objects, tmp_path):
    program = link(objects, tmp_path / "run")
    calls = [call for kernel in kernels.values() for call in kernel.random + kernel.large]
    assert len(calls) >= 5000
    assert fault_of(program, calls) is None


FAULTS = [
    # (source, file, text, its replacement)
    (*UPFIRDN2D, "> r.in[axis] ? r.in[axis]", "> r.in[axis] ? r.in[axis] + 1"),
    (*UPFIRDN2D, "r.taps[1] - 1 - (j * r.up[1] - first[1])", "j * r.up[1] - first[1]"),
    (*UPFIRDN2D, "a / b - (a % b < 0)", "a / b"),
    (*UPFIRDN2D, "x * DOWN - r.pad[1]", "x * DOWN - r.pad[0]"),
    (*UPFIRDN2D, "!inside(top + i, r.in[0])", "!inside(top + i, r.in[0] + 1)"),
    (*UPFIRDN2D, " || (UP > 1 && !inside(k + shift, TAPS))", ""),
    (*UPFIRDN2D, "inside(row, TAPS) && inside(left + j, r.in[1])", "inside(row, TAPS)"),
    (SOURCES[0], SOURCES[0], "top + row < r.out[0]", "top + row <= r.out[0]"),
    (SOURCES[0], SOURCES[0], "launch<__nv_bfloat16, float>", "launch<__half, float>"),
    (SOURCES[1], SOURCES[1], "scale : scale * negative_slope", "scale : negative_slope"),
    (SOURCES[1], SOURCES[1], "value > A(0)", "passed > A(0)"),
    (SOURCES[1], SOURCES[1], "inner % N == 0 && bits % 16 == 0", "inner % N == 0"),
    (SOURCES[1], SOURCES[1], "i / inner % channels", "i % channels"),
    (SOURCES[1], SOURCES[1], "i < size; i += step", "i < size; i += 2 * step"),
]


@needs_compiler
@pytest.mark.parametrize("source, name, text, replacement", FAULTS)
def test_planted_faults_are_caught(kernels, objects, tmp_path, source, name, text, replacement):
    op = shutil.copytree(OP, tmp_path / "op", ignore=shutil.ignore_patterns("*.py", "__*"))
    sound = (op / name).read_text()
    assert sound.count(text) == 1
    (op / name).write_text(sound.replace(text, replacement))
    changed = compile_kernel(op, source, tmp_path / "changed.o", ["-O0", "-w"])
    program = link(objects | {source: changed}, tmp_path / "run")
    kernel = kernels[source]
    assert fault_of(program, kernel.random) or fault_of(program, kernel.large)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_nvcc_compiles_for_every_architecture_without_spills(tmp_path):
    """Both sources as one: CUDA's headers take half of the time, for each intermediate code (PTX).

    Architectures of which nvcc writes the same PTX, but for its name, take that of the first; the
    machine code is each one's own.
    """
    source = tmp_path / "both.cu"
    source.write_text(
        f'#include "{OP}/{SOURCES[0]}"\n'
        "#define THREADS THREADS_2  // constants that are each source's own\n"
        "#define BLOCKS BLOCKS_2\n"
        f'#include "{OP}/{SOURCES[1]}"\n'
    )
    names = run_program(["nvcc", "--list-gpu-arch"]).stdout.split()
    architectures = [name.removeprefix("compute_") for name in names]
    assert {"80", "90"} <= set(architectures)
    first = {"86": "80", "87": "80", "88": "80", "89": "80", "110": "100", "120": "100"}
    # Torch builds extensions with these, so that no code leans on implicit conversions.
    without = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
    done = run_program(
        [
            *("nvcc", "-std=c++17", "-O3", "--Werror=all-warnings", "-Xptxas=-v"),
            *(f"-D__CUDA_NO_{name}__" for name in without),
            *(f"-gencode=arch=compute_{first.get(a, a)},code=sm_{a}" for a in architectures),
            *("-c", source, "-o", tmp_path / "both.o"),
        ]
    )
    spilled = re.findall(r"(\d+) bytes spill stores", done.stdout + done.stderr)
    assert spilled == ["0"] * (16 + 8) * len(architectures)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc, which finds CUDA's headers")
def test_binding_compiles(tmp_path):
    from torch.utils.cpp_extension import include_paths

    folders = [*include_paths(), sysconfig.get_path("include")]
    run_program(
        [
            *("nvcc", "-std=c++20", "-Xcompiler=-fsyntax-only", "-c", OP / "binding.cpp"),
            *("-DTORCH_EXTENSION_NAME=pfgm_op", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"),
            *(f"-I{folder}" for folder in folders),
            *("-o", tmp_path / "binding.o"),
        ]
    )
