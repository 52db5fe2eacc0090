"""The operators of op/: reference numbers, an independent definition, gradients, the kernels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from op import extension, fused_leaky_relu, upfirdn2d
from op.upfirdn import Pass, run_plain

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
            whole = run_plain(x, Pass(kernel, (up, up), (down, down), (*pad, *pad)))
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
            return torch.ops.pfgm.upfirdn2d(x, kernel, (up, up), (down, down), (*pad, *pad))

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
            ((torch.ones(1, 0, 8, 8), torch.ones(2, 2)), "none of C, H and W 0"),
            ((torch.ones(1, 1, 0, 8), torch.ones(2, 2), 1, 1, (4, 4)), "none of C, H and W 0"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2), 1, 1, (2**31, 0)), "fewer than 2.30"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2), 1, 1, (2**33, -(2**33))), "fewer than"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2), 2**32), "fewer than"),
            ((torch.ones(1, 1, 8, 8), torch.ones(2, 2), 1, 2**40), "fewer than"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            upfirdn2d(*arguments)


class TestFusedLeakyReLU:
    @pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 0, 5), (0, 3)])
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
            return torch.ops.pfgm.fused_leaky_relu(x, bias, None, negative_slope, scale)

        for function in (public, autograd_of_the_kernels):
            assert gradcheck(function, inputs)
            assert gradgradcheck(function, inputs)

    def test_no_channels(self):
        assert fused_leaky_relu(torch.ones(2, 0, 3), torch.ones(0)).shape == (2, 0, 3)

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


class StandIn:
    """CPU double of op/binding.cpp by the definition; it takes the arguments of the kernels."""

    def upfirdn2d(self, x, kernel, up, down, before, size):
        assert x.is_contiguous() and kernel.is_contiguous()
        assert kernel.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        ends = [
            (n - 1) * d + taps - m * u - b  # padding at the end that gives exactly this size
            for n, d, taps, m, u, b in zip(
                size, down, kernel.shape, x.shape[2:], up, before, strict=True
            )
        ]
        wide = x.new_zeros(*x.shape[:2], x.shape[2] * up[0], x.shape[3] * up[1])
        wide[:, :, :: up[0], :: up[1]] = x
        wide = F.pad(wide, (before[1], ends[1], before[0], ends[0])).to(kernel.dtype)
        windows = wide.unfold(2, kernel.shape[0], down[0]).unfold(3, kernel.shape[1], down[1])
        return (windows * kernel.flip(0, 1)).sum((4, 5)).to(x.dtype)

    def fused_leaky_relu(self, x, bias, grad, negative_slope, scale):
        assert x.is_contiguous() and bias.is_contiguous()
        assert grad is None or grad.is_contiguous()
        biased = x + bias.view(-1, *[1] * (x.ndim - 2))
        through = biased if grad is None else grad
        return torch.where(biased > 0, through * scale, through * negative_slope * scale)


@pytest.fixture
def stand_in(monkeypatch):
    """The operators as on a GPU, with a stand-in for the kernels."""
    monkeypatch.setattr(extension, "enabled", lambda x: True)
    monkeypatch.setattr(extension, "kernels", lambda x: StandIn())


def both(x, bias):
    """Both operators, one after the other."""
    return upfirdn2d(fused_leaky_relu(x, bias), torch.ones(4, 4, dtype=x.dtype), 2, 1, (2, 1))


def with_gradient(x, bias, run=both):
    x = x.detach().requires_grad_()
    out = run(x, bias)
    return out, *torch.autograd.grad(out.square().sum(), x)


class TestTracing:
    """The operators are seen by everything that traces a graph."""

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("up, down", [((2, 2), (1, 1)), ((1, 3), (2, 1))])
    def test_upfirdn2d_keeps_the_rules_of_operators(self, channels_last, up, down):
        x = random(2, 3, 6, 5).requires_grad_()
        if channels_last:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        arguments = x, random(4, 3, seed=1), up, down, (2, 1, -1, 3)
        torch.library.opcheck(torch.ops.pfgm.upfirdn2d.default, arguments)

    @pytest.mark.parametrize("gradient", [False, True])
    def test_fused_leaky_relu_keeps_the_rules_of_operators(self, gradient):
        x, bias = random(2, 3, 4).requires_grad_(), random(3, seed=1).requires_grad_()
        grad = random(2, 3, 4, seed=2).requires_grad_() if gradient else None
        operator = torch.ops.pfgm.fused_leaky_relu.default
        torch.library.opcheck(operator, (x, bias, grad, 0.2, 1.5))

    def test_make_fx_keeps_the_kernels(self, stand_in):
        x, bias = random(2, 3, 4, 4), random(3, seed=1)
        for mode in ("real", "fake", "symbolic"):
            graph = make_fx(lambda x, bias: with_gradient(x, bias), tracing_mode=mode)(x, bias)
            names = [str(node.target) for node in graph.graph.nodes]
            assert names.count("pfgm.upfirdn2d.default") == 2  # forwards and backwards
            assert names.count("pfgm.fused_leaky_relu.default") == 2
            for result, expected in zip(graph(x, bias), with_gradient(x, bias), strict=True):
                torch.testing.assert_close(result, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("kernels", [False, True])
    def test_one_graph(self, request, kernels):
        if kernels:
            request.getfixturevalue("stand_in")
        x, bias = random(2, 3, 4, 4), random(3, seed=1)
        run = torch.compile(both, fullgraph=True, backend="aot_eager")
        results = with_gradient(x, bias, run), with_gradient(x, bias)
        for result, expected in zip(*results, strict=True):
            torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("kernels", [False, True])
    def test_fake_tensors(self, request, kernels):
        if kernels:
            request.getfixturevalue("stand_in")
        with FakeTensorMode():
            x = torch.empty(2, 3, 8, 8).to(memory_format=torch.channels_last)
            out, gradient = with_gradient(x, torch.empty(3))
            many_taps = upfirdn2d(x, torch.empty(8, 8), pad=(4, 3))
        assert out.shape == (2, 3, 16, 16) and gradient.shape == many_taps.shape == x.shape

    def test_the_kernels_get_what_they_take(self, stand_in):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for down, taps in ((1, (4, 4)), (3, (3, 5)), (2, (7, 7))):
                x = random(2, 3, 9, 8).to(dtype).mT
                kernel = torch.outer(random(taps[0], seed=1), random(taps[1], seed=2))
                out = upfirdn2d(x, kernel, 2, down, (4, 3))
                exact = slow_upfirdn2d(x.double().numpy(), kernel.numpy(), 2, down, (4, 3))
                tolerance = 64 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    out.double(), torch.from_numpy(exact), rtol=tolerance, atol=tolerance
                )


@pytest.mark.parametrize("kernels", [False, True])
def test_channels_last_stays(request, kernels):
    if kernels:
        request.getfixturevalue("stand_in")
    kernel, bias = random(4, 3, seed=1), random(3, seed=2)
    x = random(2, 3, 8, 7)
    for up, down, pad in ((1, 1, (2, 1)), (2, 1, (2, 1)), (3, 2, (6, -2))):
        expected = upfirdn2d(x, kernel, up, down, pad)
        out = upfirdn2d(x.to(memory_format=torch.channels_last), kernel, up, down, pad)
        assert expected.is_contiguous()
        assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
        torch.testing.assert_close(out, expected)
    out = fused_leaky_relu(x.to(memory_format=torch.channels_last), bias)
    assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    torch.testing.assert_close(out, fused_leaky_relu(x, bias))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_infinities_and_nan_reach_the_pixels_that_the_definition_says(dtype):
    """Taps beyond the image, or on zeros in between, contribute nothing; 0 times inf is NaN."""
    kernels = [random(4, 4, seed=1), random(3, 2, seed=2), torch.ones(6, 7).double()]
    kernels.append(kernels[0] * (kernels[0] > 0))
    for kernel, up, down, pad in itertools.product(kernels, (1, 2, 3), (1, 2), ((3, 4), (6, -1))):
        x = random(1, 4, 5, 6)
        x[0, 0, 0, 5], x[0, 1, 2, 3], x[0, 2, 4, 0] = float("inf"), -float("inf"), float("nan")
        x[0, 3, 1, 1], x[0, 3, 2, 1] = float("inf"), -float("inf")
        out = upfirdn2d(x.to(dtype), kernel, up, down, pad).double().numpy()
        with np.errstate(invalid="ignore"):
            expected = slow_upfirdn2d(x.numpy(), kernel.numpy(), up, down, pad)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(out[~finite], expected[~finite])
        assert np.isfinite(out[finite]).all()


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
