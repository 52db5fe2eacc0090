"""Operators in forms that a CPU computes faster than PyTorch's own, which they are elsewhere."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 256  # most rows of an attention whose weights, rows times rows, are kept in memory

# Along an axis on which pixels are repeated, by factor: from three taps to those of the transposed
# convolution.
SUMS_OF_TAPS = {
    1: [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
    2: [[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]],
}


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """`x` where in training a `share` of the entries is 0 and the others make up for them.

    PyTorch draws the entries of a CPU one by one. Here each has 16 bits of a random word, so that
    `share` is rounded to 2^-16; the compiler fuses its own generator with what is around it.
    """
    if not training or not 0 < share < 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, share, training)
    words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    noise = torch.empty_like(x)
    numbers = words.view(torch.int16).as_strided(noise.shape, noise.stride())
    lost = min(round(share * 2**16), 2**16 - 1)  # of the 2^16 numbers, which begin at -2^15
    return x * noise.copy_(numbers >= lost - 2**15).mul_(2**16 / (2**16 - lost))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(query key^T / sqrt(C)) value` of (..., N, C) each.

    In bfloat16 PyTorch's fused form takes twice the time of the products on a CPU.
    """
    rows, channels = query.shape[-2:]
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or rows > ROWS:
        return F.scaled_dot_product_attention(query, key, value)
    return (query * channels**-0.5 @ key.mT).softmax(-1) @ value


def conv_of_repeated(x: Tensor, layer: nn.Conv2d, factors: Sequence[int]) -> Tensor:
    """A padded 3x3 convolution of `x` (B, C, H, W) whose pixels are repeated by `factors`, 1 or 2.

    Repeated pixels share products: of the nine taps at each pixel, four remain where both factors
    are 2. They are a transposed convolution with sums of the taps.
    """
    if x.device.type != "cpu":
        return layer(F.interpolate(x, scale_factor=tuple(factors)))
    sums = torch.kron(*(layer.weight.new_tensor(SUMS_OF_TAPS[factor]) for factor in factors))
    weight = layer.weight.transpose(0, 1).flatten(2) @ sums
    weight = weight.unflatten(2, [factor + 2 for factor in factors])
    return F.conv_transpose2d(x, weight, layer.bias, stride=tuple(factors), padding=1)
