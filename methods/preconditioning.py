"""Coefficients of images, and the preconditioning of a network that is made of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (x (B, C, H, W), noise_label (B,)) -> a tensor, or the Poisson field. Further conditions, such as
# class labels, are keyword arguments, which the loss binds.
Network = Callable[..., Tensor | tuple[Tensor, Tensor]]


def spread(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient, one for all images () or one each (B,), so that it multiplies `x` (B, ...).

    It may lie on the CPU where `x` does not; then the host does not wait for the copy.
    """
    return c.to(x, non_blocking=True).view(-1, *[1] * (x.dim() - 1))


def equals(c: Tensor | float, number: float) -> bool:
    """True if the coefficient `c` is one `number` for all images; the host waits for no device."""
    on_host = not isinstance(c, Tensor) or (c.dim() == 0 and c.device.type == "cpu")
    return on_host and bool(c == number)


def scaled(c: Tensor | float, x: Tensor) -> Tensor:
    """`x` (B, ...) times a coefficient, a number, () or (B,); `x` itself where that is 1."""
    if equals(c, 1):
        return x
    return (spread(c, x) if isinstance(c, Tensor) else c) * x


def linear(a: Tensor | float, x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """a x + b y for coefficients as of `scaled`; `y` itself where they are 0 and 1."""
    y = scaled(b, y)
    return y if equals(a, 0) else scaled(a, x) + y


def with_rate(f: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """f(t) and df/dt."""
    return torch.func.jvp(f, (t,), (torch.ones_like(t),))


# A function of the time, () or (B,), that gives a tensor of the same shape, or a number.
Coefficient = Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class Preconditioning:
    """Preconditioning of a network F, whose prediction at x and time t is

        c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t)).

    Source: Karras et al. 2022 (arXiv 2206.00364), equation 7 and table 1.
    """

    c_noise: Coefficient
    c_in: Coefficient = lambda t: 1.0
    c_out: Coefficient = lambda t: 1.0
    c_skip: Coefficient = lambda t: 0.0

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of F: c_in x, and a noise label for each image (B,)."""
        label = self.c_noise(t)
        dtype = x.dtype if label.is_floating_point() else label.dtype
        label = label.to(x.device, dtype, non_blocking=True).expand(len(x))
        return scaled(self.c_in(t), x), label

    def along(self, alpha: Coefficient, sigma: Coefficient) -> "Preconditioning":
        """This preconditioning of natural variables y and sigma, for x = alpha y and the time t."""
        return Preconditioning(
            c_noise=lambda t: self.c_noise(sigma(t)),
            c_in=lambda t: self.c_in(sigma(t)) / alpha(t),
            c_out=lambda t: self.c_out(sigma(t)),
            c_skip=lambda t: self.c_skip(sigma(t)) / alpha(t),
        )

    def __call__(self, net: Network, x: Tensor, t: Tensor) -> Tensor:
        """The prediction (B, ...) of `net` at `x` (B, C, H, W) and time `t`, () or (B,)."""
        return linear(self.c_skip(t), x, self.c_out(t), net(*self.inputs(x, t)))
