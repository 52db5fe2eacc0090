"""The operators of op/: reference numbers, an independent definition, gradients, the kernels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from op import extension, fused_leaky_relu, upfirdn2d
from op.leaky_relu import FusedLeakyReLU
from op.upfirdn import Pass, UpFirDn2d, run_plain

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = {
    key: torch.from_numpy(value) for key, value in np.load(ROOT / "tests/golden/ops.npz").items()
}

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def slow_upfirdn2d(x, kernel, up, down, pad):
    """The definition, pixel by pixel and tap by tap: numpy arrays in, numpy array out."""
    batch, channels, height, width = x.shape
    rows, columns = kernel.shape
    size = [
        (n * up + sum(pad) - taps) // down + 1 for n, taps in ((height, rows), (width, columns))
    ]
    out = np.zeros((batch, channels, *size))
    for y, x_ in np.ndindex(*size):
        for i, j in np.ndindex(rows, columns):
            # Where the tap lies on the image with zeros inserted: a convolution runs backwards.
            row = y * down - pad[0] + rows - 1 - i
            column = x_ * down - pad[0] + columns - 1 - j
            if row % up == column % up == 0 and 0 <= row < height * up and 0 <= column < width * up:
                out[:, :, y, x_] += kernel[i, j] * x[:, :, row // up, column // up]
    return out


@st.composite
def cases(draw):
    """Image size, filter size, up, down, pad, with at least one output pixel."""
    height, width, rows, columns = (draw(st.integers(1, 6)) for _ in range(4))
    up, down = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    before = draw(st.integers(-4, 9))
    least = max(rows - height * up, columns - width * up) - before
    return (height, width), (rows, columns), up, down, (before, draw(st.integers(least, least + 9)))


class TestReference:
    @pytest.mark.parametrize("case", range(7))
    def test_upfirdn2d(self, case):
        up, down, *pad = GOLDEN[f"upfirdn2d/{case}_up_down_pad"].tolist()
        out = upfirdn2d(GOLDEN["upfirdn2d/x"], GOLDEN["upfirdn2d/kernel"], up, down, tuple(pad))
        torch.testing.assert_close(out, GOLDEN[f"upfirdn2d/{case}_out"], rtol=0, atol=1e-5)

    def test_fused_leaky_relu(self):
        out = fused_leaky_relu(GOLDEN["upfirdn2d/x"], GOLDEN["fused/bias"])
        torch.testing.assert_close(out, GOLDEN["fused/out"], rtol=0, atol=1e-5)

    def test_resampling(self):
        x, taps = GOLDEN["resample/x"], torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        fir, box = torch.outer(taps, taps), torch.ones(2, 2)
        blurred = upfirdn2d(x, fir, pad=(2, 2))
        outputs = {
            "up": upfirdn2d(x, 4 * fir, up=2, pad=(2, 1)),
            "down": upfirdn2d(x, fir, down=2, pad=(1, 1)),
            "nup": upfirdn2d(x, box, up=2, pad=(1, 0)),
            "ndown": upfirdn2d(x, box / 4, down=2),
            "conv_down": F.conv2d(blurred, GOLDEN["resample/w"], stride=2),
        }
        for name, out in outputs.items():
            torch.testing.assert_close(out, GOLDEN[f"resample/{name}"], rtol=0, atol=1e-5)


class TestUpFirDn2d:
    @settings(max_examples=150, deadline=None)
    @given(cases(), st.integers(0, 99))
    def test_definition(self, case, seed):
        size, taps, up, down, pad = case
        x, kernel = random(2, 3, *size, seed=seed), random(*taps, seed=seed + 1)
        expected = slow_upfirdn2d(x.numpy(), kernel.numpy(), up, down, pad)
        out = upfirdn2d(x, kernel, up, down, pad)
        torch.testing.assert_close(out.numpy(), expected)

    @pytest.mark.parametrize("rows, columns", [(6, 6), (4, 12), (7, 6)])
    @pytest.mark.parametrize("up, down, pad", [(1, 1, (3, 2)), (2, 1, (7, -1)), (1, 2, (5, 6))])
    def test_separable_filter(self, rows, columns, up, down, pad):
        x, kernel = random(2, 3, 9, 8), torch.outer(random(rows, seed=1), random(columns, seed=2))
        for dtype in (torch.float64, torch.float32):
            out = upfirdn2d(x.to(dtype), kernel.to(dtype), up, down, pad)
            whole = run_plain(x, Pass(kernel, (up, up), (down, down), (pad, pad)))
            torch.testing.assert_close(out, whole.to(dtype))

    def test_almost_separable_filter_is_not_separated(self):
        x, kernel = random(1, 1, 9, 9), torch.ones(6, 6, dtype=torch.float64)
        kernel[2, 3] += 1e-9
        difference = upfirdn2d(x, kernel) - upfirdn2d(x, torch.ones_like(kernel))
        torch.testing.assert_close(difference, 1e-9 * x[:, :, 3:7, 2:6], rtol=1e-4, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2)])
    def test_dtypes(self, dtype, up, down):
        x, kernel = random(2, 3, 8, 8).to(dtype), random(4, 4, seed=1)
        out = upfirdn2d(x, kernel, up, down, (2, 1))
        exact = upfirdn2d(x.double(), kernel.to(dtype).double(), up, down, (2, 1))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)

    def test_memory_formats_agree(self):
        x, kernel = random(2, 3, 8, 8), random(4, 3, seed=1)
        for other in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            torch.testing.assert_close(upfirdn2d(other, kernel, 2), upfirdn2d(x, kernel, 2))

    def test_empty_batch(self):
        assert upfirdn2d(random(0, 3, 8, 8), random(4, 4), 2, 1, (2, 1)).shape == (0, 3, 16, 16)

    @pytest.mark.parametrize(
        "up, down, pad, taps",
        [
            (1, 1, (0, 0), (3, 2)),
            (2, 1, (2, 1), (4, 4)),
            (1, 2, (1, 1), (4, 4)),
            (3, 2, (5, -2), (2, 3)),
            (2, 3, (-1, 4), (1, 4)),
            (1, 2, (3, 2), (6, 6)),
        ],
    )
    def test_gradients(self, up, down, pad, taps):
        x = random(1, 2, 4, 3).requires_grad_()
        kernel = torch.outer(random(taps[0], seed=1), random(taps[1], seed=2))

        def public(x):
            return upfirdn2d(x, kernel, up, down, pad)

        def autograd_of_the_kernels(x):
            step = Pass(kernel, (up, up), (down, down), (pad, pad))
            return UpFirDn2d.apply(x, step, run_plain)

        for function in (public, autograd_of_the_kernels):
            assert gradcheck(function, x)
            assert gradgradcheck(function, x)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((torch.ones(3, 8, 8), torch.ones(2, 2)), r"\(B, C, H, W\)"),
            ((torch.ones(1, 1, 8, 8, dtype=torch.int64), torch.ones(2, 2)), "floating point"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2)), r"\(kh, kw\)"),
            ((torch.ones(1, 1, 8, 8), torch.ones(0, 2)), r"\(kh, kw\)"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2, requires_grad=True)), "detach"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2), 0), "at least 1"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2), 1, -1), "at least 1"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2), 1, 1, (0, 0, 0, 0)), r"\(before, after\)"),
            ((torch.ones(1, 1, 8, 8), torch.ones(9, 2)), "no output pixel"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2), 1, 1, (-4, -4)), "no output pixel"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            upfirdn2d(*arguments)


class TestFusedLeakyReLU:
    @pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 5)])
    @pytest.mark.parametrize("negative_slope, scale", [(0.2, 2**0.5), (0.7, 3.0), (-0.5, -1.0)])
    def test_definition(self, shape, negative_slope, scale):
        x, bias = random(*shape), random(3, seed=1)
        biased = x.numpy() + bias.numpy().reshape(-1, *[1] * (len(shape) - 2))
        expected = np.where(biased > 0, biased, biased * negative_slope) * scale
        out = fused_leaky_relu(x, bias, negative_slope, scale)
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12)

    @pytest.mark.parametrize("negative_slope, scale", [(0.2, 2**0.5), (-0.5, 3.0)])
    def test_gradients(self, negative_slope, scale):
        inputs = (random(2, 3, 2, 1).requires_grad_(), random(3, seed=1).requires_grad_())

        def public(x, bias):
            return fused_leaky_relu(x, bias, negative_slope, scale)

        def autograd_of_the_kernels(x, bias):
            def run(x, bias, grad):
                biased = x + bias[:, None, None]
                factor = torch.where(biased > 0, 1.0, negative_slope).double() * scale
                return (biased if grad is None else grad) * factor

            return FusedLeakyReLU.apply(x, bias, run)

        for function in (public, autograd_of_the_kernels):
            assert gradcheck(function, inputs)
            assert gradgradcheck(function, inputs)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_dtypes(self, dtype):
        x, bias = random(2, 3, 8, 8).to(dtype), random(3, seed=1)
        out = fused_leaky_relu(x, bias)
        exact = fused_leaky_relu(x.double(), bias.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize(
        "x, bias, message",
        [
            (torch.ones(3), torch.ones(3), r"\(B, C, ...\)"),
            (torch.ones(2, 3, dtype=torch.int64), torch.ones(3), "floating point"),
            (torch.ones(2, 3), torch.ones(2), "bias must be"),
            (torch.ones(2, 3), torch.ones(3, 1), "bias must be"),
        ],
    )
    def test_errors(self, x, bias, message):
        with pytest.raises(ValueError, match=message):
            fused_leaky_relu(x, bias)


class TestFallback:
    """When the kernels are used, and what is said where they are not."""

    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        monkeypatch.setenv("PATH", "")  # restored afterwards: a build extends it
        monkeypatch.delenv("PFGM_FUSED_OPS", raising=False)
        caches = (extension._gpu_available, extension._build)
        for cached in caches:
            cached.cache_clear()
        yield
        for cached in caches:
            cached.cache_clear()

    def pretend_gpu(self, monkeypatch, available=True):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    class CudaTensor:
        is_cuda = True

    def test_no_gpu_warns_once(self, monkeypatch, recwarn):
        self.pretend_gpu(monkeypatch, available=False)
        for _ in range(3):
            fused_leaky_relu(random(1, 1, 4, 4), random(1))
            upfirdn2d(random(1, 1, 4, 4), random(2, 2))
        (warning,) = recwarn.list
        assert "no CUDA device" in str(warning.message)

    def test_no_compiler_warns_once(self, monkeypatch, recwarn):
        def load(**_):
            raise RuntimeError("Error building extension:\n[1/3] nvcc\nsh: error: nvcc not found\n")

        self.pretend_gpu(monkeypatch)
        monkeypatch.setattr("torch.utils.cpp_extension.load", load)
        for _ in range(3):
            assert extension.kernels(self.CudaTensor) is None
        (warning,) = recwarn.list
        assert str(warning.message).endswith("sh: error: nvcc not found")

    def test_builds_on_the_first_cuda_call_only(self, monkeypatch, recwarn):
        builds = []
        self.pretend_gpu(monkeypatch)
        monkeypatch.setattr(
            "torch.utils.cpp_extension.load", lambda **options: builds.append(options)
        )
        extension.kernels(torch.ones(1))
        assert not builds
        extension.kernels(self.CudaTensor)
        extension.kernels(self.CudaTensor)
        (options,) = builds
        assert all(Path(source).is_file() for source in options["sources"])
        assert not recwarn.list

    def test_switched_off(self, monkeypatch, recwarn):
        self.pretend_gpu(monkeypatch)
        monkeypatch.setenv("PFGM_FUSED_OPS", "0")
        assert extension.kernels(self.CudaTensor) is None
        assert not recwarn.list

    def test_import_builds_nothing(self):
        code = "import sys, op; assert 'torch.utils.cpp_extension' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_autocast_leaves_the_dtype_alone():
    x = torch.randn(1, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for out in (upfirdn2d(x, torch.ones(4, 4), down=2), upfirdn2d(x, torch.ones(4, 4), up=2)):
            assert out.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_separated_filters_are_not_rounded(dtype):
    taps = torch.tensor([1.0, 3.0, 5.0, 5.0, 3.0, 1.0, 0.5])  # 7 x 7: two passes
    kernel = torch.outer(taps, taps)
    x = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(
        upfirdn2d(x, kernel.to(dtype)), upfirdn2d(x, kernel.double()), rtol=1e-12, atol=1e-12
    )
