"""Electrostatic field matching, from one data set to another.

Source: Kolesov et al. 2025 (arXiv 2502.02367).

The images of the prior P are positive charges on the plate z = 0 of R^(N+1), those of the data Q
negative charges on the plate z = L. The charges of each plate add up to 1 in magnitude, so that
every field line that leaves an image of P ends at an image of Q, at each in proportion to its
charge.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from configs.schema import LENGTH, Key
from methods.base import Method, noise_like
from methods.field import difference_field
from sources.batch import Batch
from sources.codec import Codec, encoded
from sources.codec import from_config as get_codec
from sources.latents import Latents
from sources.opened import OpenedData
from sources.prior import KEYS as OF_PRIOR
from sources.stream import DataSet

KEYS = {
    "efm.L": Key(
        4.0, LENGTH, "field matching: distance between the plates of prior and data (scaled)"
    ),
    "efm.z_min": Key(
        0.02, LENGTH, "field matching: distance from a plate at which lines start and end; below L"
    ),
    "efm.reach": Key(
        100.0,
        LENGTH,
        "field matching: largest distance of training points from the plates; beyond it the field "
        "is taken to be that of a dipole, whose lines come back mirrored",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Examples(Batch):
    """Points (x, z) of the space between and around the plates: x as `images`, and `z` (B,)."""

    z: Tensor


@dataclass(frozen=True)
class BothPlates(Batch):
    """Images of the data, and equally many, drawn independently, of the prior: `charges`."""

    charges: Tensor | None = None


@dataclass(frozen=True)
class PriorImages:
    """Random encoded images of the prior, which are read when they are first needed.

    Where an autoencoder in a file is the codec, training encodes all of them once.
    """

    data: OpenedData
    codec: Callable[[], Codec]

    @cached_property
    def images(self) -> DataSet:
        """The images as stored."""
        return self.data.prior_images()

    def draw(
        self, number: int, generator: torch.Generator | None, device: torch.device | str
    ) -> Tensor:
        """Independent draws (number, C, H, W), as the network sees them."""
        rows = torch.randint(len(self.images), (number,), generator=generator, device=device)
        return encoded(self.codec(), self.images[rows.cpu()].to(device))

    def spread(
        self, number: int, generator: torch.Generator | None, device: torch.device | str
    ) -> Tensor:
        """Images (number, C, H, W) in random order, each as often as any other or once more."""
        rounds = -(-number // len(self.images))
        draw = {"generator": generator, "device": device}
        orders = [torch.randperm(len(self.images), **draw) for _ in range(rounds)]
        images, codec = self.images, self.codec()
        if isinstance(codec, Latents):
            images, codec = self.data.prior_latents(images, codec, device), codec.scale
        return encoded(codec, images[torch.cat(orders)[:number].cpu()].to(device))


def start_radius(z_min: float, dim: int) -> float:
    """Radius of the sphere on which lines leave an image of `dim` entries, about `z_min` high."""
    return z_min * math.sqrt(dim + 1)


@dataclass(frozen=True, kw_only=True)
class FieldMatching(Method):
    """Electrostatic field matching: samples follow field lines from the prior's images to the data.

    The network's output is the direction of the field, times sqrt(N+1): it has one channel more
    than the image, and the spatial mean of that channel is the z entry. Instead of a noise level,
    samplers report the share of the lines that have not ended.

    Attributes:
        L: distance between the plates.
        z_min: distance from a plate at which lines start and end.
        reach: largest distance of training points from the segments between images; farther from
            the middle between the plates the field is taken to be that of a dipole.
        prior: the images that lines start from.
    """

    L: float
    z_min: float
    reach: float
    prior: PriorImages = field(repr=False, compare=False)

    keys = KEYS | OF_PRIOR
    options = {name.partition(".")[2]: name for name in KEYS}
    extra_channels = 1
    uses_reference_batch = True
    positive_labels = False
    follows_lines = True
    level_name = "share of lines not yet ended"
    noisy_end = False
    t_prior, t_data = 1.0, 0.0

    def __post_init__(self):
        self.check_rising("z_min", "L")
        self.check_rising("L", "reach")

    @property
    def name(self) -> str:
        return f"Field matching, L = {self.L:g}"

    @classmethod
    def from_config(cls, config):
        images = PriorImages(OpenedData(config.data), partial(get_codec, config))
        if not config.data.prior_dataset:
            raise ValueError(
                f"training.sde={config.training.sde!r} leads from one data set to another: set "
                "data.prior_dataset, and data.prior_path or data.prior_classes"
            )
        if config.data.patch:
            raise ValueError(
                f"data.patch={tuple(config.data.patch)}: training.sde={config.training.sde!r} "
                "leads from whole images to whole images: leave it out"
            )
        return cls(prior=images, **{name: config.efm[name] for name in cls.options})

    def with_data(self, data, codec):
        return replace(self, prior=PriorImages(data, lambda: codec))

    def origin(self):
        return {"prior": self.prior.data.prior_digest}

    def check_conditions(self, names):
        if names:
            raise ValueError(
                f"{self.name}: its network is given no conditions, but the config has {names[0]}"
            )

    # --- training ---

    def reference(self, batch, generator=None):
        charges = self.prior.spread(len(batch), generator, batch.images.device)
        return BothPlates(batch.images, batch.conditions, charges)

    def draw(self, batch, generator=None):
        """Points around the segments between pairs of images.

            p = (1 - s) (x_P, 0) + s (x_Q, L) + r u

        with s in [0, 1], a quarter of them at either end, u uniform on the sphere, and ln r
        uniform; r is from half the radius at which lines start up to `reach`.
        """
        start, end = batch.charges.flatten(1), batch.images.flatten(1)
        draw = {"generator": generator, "device": start.device, "dtype": start.dtype}
        share = (2 * torch.rand(len(start), 1, **draw) - 0.5).clamp(0, 1)
        ends = math.log(start_radius(self.z_min, start.shape[1]) / 2), math.log(self.reach)
        radius = (ends[0] + (ends[1] - ends[0]) * torch.rand(len(start), 1, **draw)).exp()
        centre = torch.cat([torch.lerp(start, end, share), share * self.L], 1)
        direction = torch.nn.functional.normalize(noise_like(centre, generator))
        points = centre + radius * direction
        x, z = points[:, :-1].view_as(batch.images), points[:, -1]
        return Examples(images=x, conditions=batch.conditions, z=z)

    def target(self, examples, reference):
        points = torch.cat([examples.images.flatten(1), examples.z[:, None]], dim=1)
        directions = difference_field(points, reference.charges, reference.images, self.L)
        return math.sqrt(points.shape[1]) * directions

    def predict(self, net, examples):
        x, z = net(examples.images, self.label(examples.z))
        return torch.cat([x.flatten(1), z[:, None]], dim=1)

    def label(self, z: Tensor) -> Tensor:
        """Noise labels of heights `z` (B,), which rise with z, steeply at both plates."""
        return (z / self.z_min).asinh() + ((z - self.L) / self.z_min).asinh()

    # --- sampling ---

    def direction(self, net, points: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Unit vectors (B, N+1) along the learned field at `points` (B, N+1).

        Farther than `reach` from the middle between the plates the field is taken to be that of a
        dipole, whose direction is constant along a ray.

        Args:
            net: the network, to which conditions are bound.
            points: (x, z).
            shape: (C, H, W) of an image.
        """
        middle = torch.zeros_like(points)
        middle[:, -1] = self.L / 2
        distance = torch.linalg.vector_norm(points - middle, dim=1, keepdim=True)
        points = torch.lerp(middle, points, (self.reach / distance).clamp(max=1))
        examples = Examples(images=points[:, :-1].unflatten(1, shape), z=points[:, -1])
        return torch.nn.functional.normalize(self.predict(net, examples))

    def prior_sampling(self, shape, generator=None, device="cpu"):
        return self.prior.draw(shape[0], generator, device)

    def prior_logp(self, x):
        self.check_ode("a density of the prior")

    def check_likelihood(self):
        self.check_ode("the likelihood")

    def check_kernel(self, feature):
        self.check_ode(feature)

    def slope(self, net, y, sigma):
        self.check_ode("the slope")

    @property
    def level_range(self) -> tuple[float, float]:
        return self.t_data, self.t_prior

    def sigma(self, t):
        return t

    def time(self, sigma):
        return sigma
