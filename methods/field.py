"""Targets that a reference batch makes at perturbed images: Poisson field and posterior mean.

Sources: Xu et al. 2022 (arXiv 2209.11178) and, for any number of augmenting dimensions, 2023
(arXiv 2302.04265).
"""

import math

import torch
from torch import Tensor

from execution import full_float32
from sources.batch import Batch

DATA_CHUNK = 2048  # rows of the data that are float64 at a time, which bounds the memory

# Compute capabilities of the GPUs with float64 at about half the rate of float32: P100, V100, A100,
# H100, B200 and AMD's CDNA 3. All others have 1/32 or 1/64 of it. Source: the throughput table of
# NVIDIA's CUDA C++ Programming Guide; AMD's MI300X data sheet.
FAST_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (9, 4), (10, 0)}

# Columns of which `split_products` sums the leading bits exactly: a sum of 2^12 products of 6 by 6
# bits fits the 24 bits of a float32.
SPLIT_COLUMNS, SPLIT_BITS = 4096, 6


def own_class(examples: Batch, reference: Batch) -> Tensor | None:
    """Mask (B, n) of the `reference` images that make the target of each example.

    They are those of the example's class, or all where its label is -1. None without labels.
    """
    if examples.labels is None or reference.labels is None:
        return None
    labels = examples.labels[:, None]
    return (labels == reference.labels) | (labels < 0)


def poisson_field(
    perturbed: Tensor, data: Tensor, gamma: float, among: Tensor | None = None
) -> Tensor:
    """The normalised empirical Poisson field that `data` make at `perturbed` (Algorithm 1).

    The field of a charge falls with the N-th power of its distance, so that the sum of all points
    from p = (x, z) to (E[y | x, z], 0), the posterior mean of a Student t with D = 1 and scale z:

        sqrt(N) g / (||g|| + gamma),    g = (E[y | x, z], 0) - p.

    Args:
        perturbed: augmented points p = (x, z), (B, N+1).
        data: charges on the plane z = 0, (n, ...) with N entries each.
        gamma: keeps the field small near a charge, where its direction is uncertain; >= 0.
        among: which of the charges count for each point, (B, n) bool, at least one; None for all.

    Returns:
        The field (B, N+1), in the dtype of `perturbed`.
    """
    x, z = perturbed[:, :-1], perturbed[:, -1:].double()
    field = torch.cat([weighted_mean(x, data, z, 1.0, among) - x, -z], dim=1)
    norm = torch.linalg.vector_norm(field, dim=1, keepdim=True)
    return (math.sqrt(x.shape[1]) * field / (norm + gamma)).to(perturbed.dtype)


def posterior_mean(
    x: Tensor, data: Tensor, sigma: float | Tensor, D: float, among: Tensor | None = None
) -> Tensor:
    """E[y | x, sigma] where y is one of `data`, each as likely, and x - y a Student t.

    It is the training target of least variance ("stable target field", arXiv 2302.00670).

    Args:
        x: perturbed images (B, C, H, W).
        data: the reference batch y, (n, C, H, W).
        sigma: noise levels > 0, (B,), or one for all.
        D: degrees of freedom > 0, the dimensions that augment the data; `math.inf` for a Gaussian.
        among: which of the data count for each image, (B, n) bool, at least one; None for all.

    Returns:
        (B, C, H, W), in the dtype of `x`.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
    return weighted_mean(x.flatten(1), data, sigma[:, None], D, among).view_as(x).to(x.dtype)


def difference_field(points: Tensor, positive: Tensor, negative: Tensor, L: float) -> Tensor:
    """Unit vectors along the field of two plates of charges in R^(N+1), E_P - E_Q.

    Each plate has the total charge 1; with p_j the positions of its n charges,

        E = sum_j (p - p_j) / ||p - p_j||^(N+1) / n.

    Args:
        points: p = (x, z), (B, N+1).
        positive: charges of P on the plate z = 0, (n, ...) with N entries each.
        negative: charges of Q on the plate z = L, as `positive`.
        L: distance between the plates.

    Returns:
        Directions (B, N+1) in the dtype of `points`; 0 where the field is 0.

    Source: Kolesov et al. 2025 (arXiv 2502.02367).
    """
    x, z = points[:, :-1], points[:, -1:].double()
    fields, strengths = [], []
    for data, height in ((positive, 0.0), (negative, L)):
        mean, log_weight = weighted(x, data, (z - height).abs(), 1.0)
        fields.append(torch.cat([x - mean, z - height], dim=1))
        strengths.append(log_weight - math.log(len(data)))
    of_p, of_q = (torch.cat(strengths, 1) - torch.maximum(*strengths)).exp().split(1, dim=1)
    return torch.nn.functional.normalize(of_p * fields[0] - of_q * fields[1]).to(points.dtype)


def weighted_mean(
    x: Tensor, data: Tensor, sigma: Tensor, D: float, among: Tensor | None = None
) -> Tensor:
    """The posterior mean (B, N), float64, of `data` given `x`; see `weighted`."""
    return weighted(x, data, sigma, D, among)[0]


def weighted(
    x: Tensor, data: Tensor, sigma: Tensor, D: float, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The posterior mean (B, N) of the y_j given `x`, and the log of the weights' sum (B, 1):

        sum_j w_j y_j / sum_j w_j,    w_j = (||x - y_j||^2 + D sigma^2)^(-(N+D)/2),

    and for D = inf w_j = exp(-||x - y_j||^2 / (2 sigma^2)). Both are float64.

    Distances and sum are matrix products, accumulated over chunks of the data (a running softmax):
    nothing of size B * n * N exists. Distances come as differences of squares, and the weights are
    high powers of them, which in float32 would leave an error of 1e-5. So everything is float64;
    on a device that is slow at it, only arrays of size B * n are, and the large products are
    composed of float32 products.

    Args:
        x: (B, N).
        data: the y_j, (n, ...) with N entries each.
        sigma: (B, 1), float64.
        D: degrees of freedom > 0, or `math.inf`.
        among: which of the data have a weight in each row, (B, n) bool, at least one; None for all.
    """
    whole = x.dtype == torch.float64 or has_fast_double(x.device)
    x, dim = x.double(), x.shape[1]
    point_norm = x.square().sum(1, keepdim=True)
    scale = (sigma**2 * (2 if math.isinf(D) else D)).clamp(min=1e-200)

    log_total = torch.full_like(sigma, -torch.inf)
    mean = torch.zeros_like(x)  # of the data seen so far
    for k, y in enumerate(data.flatten(1).split(DATA_CHUNK)):
        y = y.double() if whole else y.float()
        products = x @ y.T if whole else split_products(x.float(), y)
        data_norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64).square()
        ratio = torch.add(data_norm, products, alpha=-2).add_(point_norm).clamp_(min=0).div_(scale)
        # log1p of the ratio: the part of the logarithm that is common to the data would round
        log_weight = ratio.neg_() if math.isinf(D) else ratio.log1p_().mul_(-0.5 * (dim + D))
        if among is not None:
            # finite, so that a chunk without any leaves no nan; it counts nothing beside the others
            others = ~among[:, k * DATA_CHUNK :][:, : len(y)]
            log_weight.masked_fill_(others, torch.finfo(log_weight.dtype).min)
        log_chunk = log_weight.logsumexp(1, keepdim=True)
        log_sum = torch.logaddexp(log_total, log_chunk)
        with full_float32():  # weights are at most 1, so float32 products leave a rounding of y
            inflow = (log_weight - log_sum).exp_().to(y.dtype) @ y
        mean = mean * (log_total - log_sum).exp() + inflow
        log_total = log_sum
    common = 0.0 if math.isinf(D) else -0.5 * (dim + D) * scale.log()
    return mean, log_total + common


def has_fast_double(device: torch.device) -> bool:
    """True if float64 is the fast way to accurate matrix products on `device`."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST_DOUBLE


def split_products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T (B, n), float64, from float32 matrix products of `x` (B, N) and `y` (n, N), float32.

    Each operand is split into its leading bits, on one grid for a row, and a rest. Products of
    leading bits are sums of integers, at most 2^24, exact in whichever order; those with a rest are
    2^6 times smaller, and with them the rounding: some 2^-30 of the terms. This is the first slice
    of the method of Ozaki et al. (Numerical Algorithms 59, 2012).
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
