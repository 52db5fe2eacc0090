"""The empirical Poisson field of a reference batch (Xu et al. 2022, arXiv 2209.11178)."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Charges that `poisson_field` converts to float64 at a time: bounds its memory to this many rows.
FIELD_CHUNK = 2048

# CUDA devices whose float64 runs at half the rate of float32 (or the like): the data-centre cards
# P100, V100, A100, H100 and B200, and AMD's CDNA 3. All others have 1/32 or 1/64 of it. Source: the
# throughput table of NVIDIA's CUDA C++ Programming Guide; AMD's MI300X data sheet.
FAST_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (9, 4), (10, 0)}

# Columns of which `split_products` sums the leading bits exactly: 2^12 products of 6 by 6 bits and
# their sums fit the 24 bits of a float32.
SPLIT_COLUMNS, SPLIT_BITS = 4096, 6


def poisson_field(perturbed: Tensor, data: Tensor, gamma: float) -> Tensor:
    """The normalised empirical Poisson field that `data` make at `perturbed` (Algorithm 1).

    The field of a charge falls with the (D+1)-th power of its distance d_j, so the field is
    g = sum_j w_j (y_j, 0) - p with weights w = softmax(-(D+1) log d_j): distances and the weighted
    sum are matrix products, accumulated over chunks of charges (a running softmax), and nothing of
    size B * n * D exists. Distances come as differences of squares and count D + 1 times in the
    weights, which in float32 would leave an error of 1e-5. So everything is float64; where a device
    is slow at it, only what is of size B * n, and the large products are made of float32 ones.

    Args:
        perturbed: augmented points p = (x, z), (B, D+1).
        data: charges on the plane z = 0, (n, ...) with D entries each.
        gamma: keeps the field small near a charge, where its direction is uncertain; >= 0.

    Returns:
        sqrt(D) g / (||g|| + gamma), (B, D+1), in the dtype of `perturbed`.
    """
    x, z = perturbed[:, :-1].double(), perturbed[:, -1:].double()
    dim = x.shape[1]
    point_norm = x.square().sum(1, keepdim=True) + z.square()
    whole = perturbed.dtype == torch.float64 or has_fast_double(perturbed.device)

    log_total = torch.full_like(z, -torch.inf)
    centre = torch.zeros_like(x)  # the weighted mean of the charges seen so far
    for y in data.flatten(1).split(FIELD_CHUNK):
        y = y.double() if whole else y.float()
        products = x @ y.T if whole else split_products(x.float(), y)
        charge_norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64).square()
        distance = torch.add(charge_norm, products, alpha=-2).add_(point_norm)
        distance = distance.clamp_(min=torch.finfo(x.dtype).tiny)
        log_weight = distance.log_().mul_(-0.5 * (dim + 1))
        log_chunk = log_weight.logsumexp(1, keepdim=True)
        log_sum = torch.logaddexp(log_total, log_chunk)
        with full_float32():  # weights are at most 1, so float32 products leave a rounding of y
            inflow = (log_weight - log_sum).exp_().to(y.dtype) @ y
        centre = centre * (log_total - log_sum).exp() + inflow
        log_total = log_sum

    field = torch.cat([centre - x, -z], dim=1)
    norm = torch.linalg.vector_norm(field, dim=1, keepdim=True)
    return (math.sqrt(dim) * field / (norm + gamma)).to(perturbed.dtype)


def has_fast_double(device: torch.device) -> bool:
    """Whether float64 matrix products are the fast way to accurate ones on `device`."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST_DOUBLE


def split_products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T (B, n), float64, from float32 matrix products of `x` (B, D) and `y` (n, D), float32.

    Each operand is its leading bits, on one grid for a row, and a rest. Products of leading bits
    are sums of integers, at most 2^24, exact in whichever order; those with a rest are 2^6 times
    smaller, and with them the rounding: some 2^-30 of the terms. The idea is that of Ozaki et al.
    (Numerical Algorithms 59, 2012), cut off after the first slice.
    """
    total = x.new_zeros(len(x), len(y), dtype=torch.float64)
    with full_float32():
        for a, b in zip(x.split(SPLIT_COLUMNS, 1), y.split(SPLIT_COLUMNS, 1), strict=True):
            a_high, b_high = leading_bits(a), leading_bits(b)
            total += a_high @ b_high.T
            total += torch.addmm(a_high @ (b - b_high).T, a - a_high, b.T)
    return total


def leading_bits(x: Tensor) -> Tensor:
    """`x` (B, K), float32, rounded to multiples of its rows' largest power of two / 2^5."""
    largest = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    power_of_two = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    unit = power_of_two * 2.0 ** (1 - SPLIT_BITS)
    return (x / unit).round_() * unit


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within the `with` block float32 matrix products are that, also where TF32 is allowed."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
