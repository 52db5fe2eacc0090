"""The CUDA kernels against the plain path, on a GPU."""

import pytest
import torch

from op import extension, fused_leaky_relu, upfirdn2d

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Of eps: sums of tens of terms of order one, rounded once more in the plain path's two steps.
TOLERANCE = 64
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    module = extension.kernels(torch.ones(1, device="cuda"))
    assert module is not None, "the kernels were not built; the warning says why"


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to("cuda", dtype)


def derivatives(function, *inputs):
    """Output, gradients, and gradients of a function of the gradients, which has curvature."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = random(*out.shape, dtype=out.dtype, seed=7).requires_grad_()
    first = torch.autograd.grad((out * weight).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), weight)
    return [out, *first, *second]


def assert_kernel_agrees(monkeypatch, function, *inputs):
    """The kernel in the dtype of the inputs against the plain path in float64."""
    results = derivatives(function, *inputs)
    with monkeypatch.context() as patch:
        patch.setenv("PFGM_FUSED_OPS", "0")
        exact = derivatives(function, *(x.double() for x in inputs))
    dtype = inputs[0].dtype
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype == dtype
        scale = expected.abs().max().item() if expected.numel() else 0.0
        tolerance = TOLERANCE * torch.finfo(dtype).eps * max(scale, 1.0)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size, taps, up, down, pad",
    [
        ((32, 32), (4, 4), 2, 1, (2, 1)),
        ((32, 32), (4, 4), 1, 2, (1, 1)),
        ((32, 32), (4, 4), 1, 1, (2, 2)),
        ((33, 7), (4, 3), 2, 1, (-1, 4)),
        ((17, 5), (2, 4), 1, 2, (3, 0)),
        ((1, 1), (3, 1), 1, 1, (2, 2)),
        ((9, 13), (5, 2), 3, 2, (6, -2)),
        ((64, 40), (8, 8), 2, 2, (3, 4)),
        ((300, 517), (4, 4), 2, 1, (2, 1)),
    ],
)
def test_upfirdn2d(monkeypatch, dtype, size, taps, up, down, pad):
    kernel = torch.outer(random(taps[0], seed=1), random(taps[1], seed=2)).to(dtype)
    x = random(3, 5, *size, dtype=dtype)
    assert_kernel_agrees(monkeypatch, lambda x: upfirdn2d(x, kernel, up, down, pad), x)


def test_upfirdn2d_of_many_planes(monkeypatch):
    x, kernel = random(300, 700, 2, 3, dtype=torch.float32), random(4, 4, seed=1)
    assert_kernel_agrees(monkeypatch, lambda x: upfirdn2d(x, kernel, 2, 1, (2, 1)), x)


@pytest.mark.slow
def test_upfirdn2d_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    x = torch.zeros(2**16 + 1, 32, 32, 32, device="cuda", dtype=torch.float16)
    x[-1] = random(32, 32, 32, dtype=torch.float16)
    kernel = random(4, 4, dtype=torch.float16, seed=1)
    last = upfirdn2d(x[-1:], kernel, pad=(2, 1))
    assert torch.equal(upfirdn2d(x, kernel, pad=(2, 1))[-1:], last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 7), (2, 3, 16, 16), (2, 3, 5, 3), (0, 3, 4, 4)])
@pytest.mark.parametrize("negative_slope", [0.2, 0.7, -0.5])
def test_fused_leaky_relu(monkeypatch, dtype, shape, negative_slope):
    x, bias = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    if dtype in (torch.float16, torch.bfloat16) and x.numel():
        # The plain path in float64 sees the same sign where the sum is not too small to tell.
        x = torch.where((x + bias.view(-1, *[1] * (x.ndim - 2))).abs() < 1e-2, 1, x)
    function = lambda x, bias: fused_leaky_relu(x, bias, negative_slope)  # noqa: E731
    assert_kernel_agrees(monkeypatch, function, x, bias)


@pytest.mark.parametrize("view", ["channels_last", "transposed", "sliced", "misaligned"])
def test_strided_inputs(monkeypatch, view):
    x = random(2, 4, 8, 9, dtype=torch.float32)
    strided = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.mT,
        "sliced": lambda: x[:, 1:, ::2],
        "misaligned": lambda: x.flatten()[1:-63].view(-1, 4, 2, 4),
    }[view]()
    kernel, bias = random(4, 4, seed=1), random(strided.shape[1], dtype=torch.float32, seed=2)
    assert_kernel_agrees(monkeypatch, lambda x: upfirdn2d(x, kernel, 2, 1, (2, 1)), strided)
    assert_kernel_agrees(monkeypatch, fused_leaky_relu, strided, bias)


def test_current_stream():
    x, kernel = random(8, 8, 64, 64, dtype=torch.float32), random(4, 4, seed=1)
    expected = upfirdn2d(2 * x, kernel)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the kernel must wait for the product, not run beside it
        out = upfirdn2d(2 * x, kernel)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    x, kernel = random(2, 3, 8, 8, dtype=torch.float32), random(4, 4, seed=1)
    out = upfirdn2d(x.to("cuda:1"), kernel)
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out.to("cuda:0"), upfirdn2d(x, kernel))
