"""Forms of operators for the CPU against their definitions in float64."""

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck

from op.on_cpu import attention, conv_of_repeated

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
