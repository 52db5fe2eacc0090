"""Forms of operators for the CPU against their definitions in float64."""

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck

from op.on_cpu import attention, conv_of_repeated, dropout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("factors", [(2, 2), (1, 2), (2, 1)])
def test_a_convolution_of_repeated_pixels_is_one_of_the_larger_image(factors):
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    larger = x.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
    expected, output = layer(larger), conv_of_repeated(x, layer, factors)
    torch.testing.assert_close(output, expected)
    variables, weights = (x, *layer.parameters()), torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, variables, weights),
        torch.autograd.grad(expected, variables, weights),
    )


def test_a_convolution_of_repeated_pixels_is_twice_differentiable():
    layer = nn.Conv2d(1, 2, 3, padding=1).double()
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: conv_of_repeated(x, layer, (2, 2)).sin(), x)


@pytest.mark.parametrize("rows", [16, 257])
def test_attention_in_bfloat16_is_the_definition(rows):
    tensors = [torch.randn(2, 1, rows, 8).bfloat16().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    query, key, value = exact
    expected = (query @ key.mT / 8**0.5).softmax(-1) @ value
    output = attention(*tensors)
    assert output.dtype == torch.bfloat16
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad(output, tensors, weights)
    expected_gradients = torch.autograd.grad(expected, exact, weights.double())
    for got, want in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert (got.double() - want).norm() < 2**-6 * want.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_a_share_and_scales_the_rest(dtype, layout):
    shape, share = (2, 19, 63, 65), 0.3  # not a multiple of four entries
    x = torch.rand(shape).add(0.5).to(dtype).contiguous(memory_format=layout).requires_grad_()
    output = dropout(x, share, training=True)
    assert output.dtype == dtype and output.is_contiguous(memory_format=layout)
    kept = output != 0
    torch.testing.assert_close(output[kept], x[kept] / (1 - share), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, kept.to(dtype) / (1 - share), rtol=1e-2, atol=0)
    for part in (kept, kept[:, :9], kept[:, :, ::4], kept[..., 1::4]):
        deviation = (share * (1 - share) / part.numel()) ** 0.5
        assert abs(1 - part.float().mean() - share) < 5 * deviation


def test_neighbours_are_dropped_independently():
    kept = dropout(torch.ones(2**18), 0.5, training=True) / 2
    for lag in range(1, 9):
        together = (kept[lag:] * kept[:-lag]).mean()
        assert abs(together - 0.25) < 5 * (3 / 16 / 2**18) ** 0.5


@pytest.mark.parametrize("share", [0.0, 1e-9, 1 - 1e-9, 1.0])
def test_dropout_at_the_ends_of_its_range(share):
    output = dropout(torch.ones(999), share, training=True)
    assert (output == (share < 0.5)).float().mean() > 0.99


def test_dropout_repeats_with_the_seed_and_only_in_training():
    x = torch.randn(3, 7)
    torch.manual_seed(1)
    first, second = (dropout(x, 0.5, training=True) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5, training=True), first)
    assert not torch.equal(second, first)
    assert torch.equal(dropout(x, 0.5, training=False), x)
