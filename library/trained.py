"""The trained network that `experiment.load` returns, and what can be done with it."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import execution
from configs.keys import shown
from experiment_parts import Parts
from library.arguments import check_floats, check_shape, checked_levels, checked_seed, checked_seeds
from library.restoration import damaged
from library.trained_conditions import ClassLabel, Conditioned, OtherConditions
from likelihood import unit_of
from methods.base import Network, conditioned
from methods.restoration import Measurement
from reports.progress import solver_bar
from samplers.base import Sampler
from solvers.base import Watch
from solvers.solve import encode, solve_ode
from solvers.states import States
from sources.keyed import keyed_generator

LOWEST_SHOWN = 0.03  # noise level, in `Method.sigma_unit`, below which noise hardly shows


def check_ended(images: Tensor) -> None:
    """Raise FloatingPointError where some `images` are nan: their field lines were given up."""
    if lost := int((~images.flatten(1).isfinite().all(1)).sum()):
        raise FloatingPointError(
            f"{lost} of {len(images)} field lines have not ended at the data: raise "
            "sampling.max_evaluations, or train the network longer"
        )


class Trained(Conditioned):
    """A trained network and what can be done with it.

    Images are float tensors (n, C, H, W) in [0, 1], and noise levels are in the same unit: at 0.1
    the noise is a tenth of the way from black to white. Arrays in units of their own (`data.dtype`)
    are float64, and noise levels in standard deviations of a channel; all that is said of images
    holds for them. Latents are those of the method's prior.
    Arguments may be on any device; results are on that of the network. A class label is one for all
    images, or one for each (n,), as a number or as a name of `class_names`; -1 is none.
    `conditions` are those besides class labels, rows (n, ...) by name, of a network that has any
    (`data.conditions`, and the `image` of `data.condition_path`; see `encoded_condition`).

    `denoise`, `encode`, `decode`, `log_likelihood` and `bits_per_dim` can be differentiated by the
    images or latents they are given, where these require a gradient, and by nothing else; through
    an ODE that takes the memory of all its evaluations. Samples have no gradient. The caller's
    autocast, TF32 and default dtype change nothing.

    Attributes:
        experiment: the config's `experiment.Experiment`, for what is not here.
        path: the file that the weights come from.
        step: number of training steps they have taken.
        shape: (C, H, W) of an image.
        class_names: by class number; empty where the classes have no names.
    """

    def __init__(self, experiment: Parts, path: Path, step: int):
        super().__init__(experiment)
        self.path, self.step = path, step
        self.shape = experiment.codec.data_shape
        self.batch_size = experiment.sampler.batch_size

    @property
    def at_once(self) -> int:
        """Number of samples that are drawn together."""
        return 1 if self.experiment.sampler.couples_samples else self.batch_size

    @execution.own_numerics()
    def sample(
        self,
        seeds: Iterable[int],
        class_label: ClassLabel = None,
        *,
        measurement: Measurement | None = None,
        conditions: OtherConditions = None,
        condition: Tensor | None = None,
        strict: bool = True,
    ) -> Tensor:
        """Images (n, C, H, W) in [0, 1], one for each of n `seeds`; each depends on its seed alone.

        Up to rounding an image does not depend on the other seeds. Samples are therefore drawn
        `eval.batch_size` at once, but one by one where the sampler has one step size for all
        (`Sampler.couples_samples`).

        Args:
            seeds: whole numbers from 0 to 2^63 - 1, of Python, numpy or PyTorch.
            class_label: None for `sampling.class_label`; where that is -1, a class is drawn.
            measurement: of n images; `sampling.restorer` makes the samples agree with it.
            conditions: rows (n, ...) by name, of `data.conditions`; any other is that of a training
                image, which the seed draws.
            condition: for a network with `data.condition_path`, in its own units: one image
                (C, H, W) for all seeds, or one for each; the samples are draws from its posterior.
            strict: raise where a sample is given up by itself, as a field line is; else it is nan.

        Raises:
            ValueError: a seed or a class label is not a valid one, or conditions do not fit.
            FloatingPointError: the solution is not finite, or takes more evaluations than
                `sampling.max_evaluations`.
        """
        form = {"device": self.experiment.device, "dtype": self.experiment.codec.precision}
        images, seeds = [torch.empty(0, *self.shape, **form)], checked_seeds(seeds)
        if condition is not None:
            image = self.encoded_condition(condition, len(seeds))
            conditions = {**(conditions or {}), "image": image}
        for sampler, start in self._batches(seeds, class_label, measurement, conditions):
            with self._solving(start.pop("seeds")) as watch:
                batch, _ = sampler(self.experiment.network, watch=watch, **start)
                if strict:
                    check_ended(batch)
            images.append(batch)
        return torch.cat(images)

    @execution.own_numerics()
    def restore(
        self,
        measured: Measurement | Tensor,
        name: str = "",
        seeds: Iterable[int] = range(5),
        class_label: ClassLabel = None,
        *,
        noise: float = 0.0,
        missing: Tensor | None = None,
        conditions: OtherConditions = None,
    ) -> Tensor:
        """Restorations (n, k, C, H, W) in [0, 1] of n damaged images, one for each of k `seeds`.

        The mean over the seeds has the least squared error; each by itself looks like an image.

        Args:
            measured: a measurement, or images in [0, 1] that were damaged as `name` says.
            name: 'inpaint', 'colour' for images (n, 1, H, W), 'super2', 'super4' or 'super8' for
                images that are so much smaller, or 'denoise'.
            class_label: as in `encode`; that of the images.
            noise: standard deviation of noise in the images; 1 is from black to white.
            missing: bool, (H, W) or one for each image (n, H, W): the pixels to fill in, whose
                values do not count.
            conditions: as in `encode`.

        Raises:
            ValueError: the images have another shape than `name` needs, or cannot be restored so.
            FloatingPointError: as in `sample`.
        """
        device = self.experiment.device
        self.experiment.check_ode("restore")
        if not isinstance(measured, Measurement):
            images = torch.as_tensor(measured, device=device)
            measured = damaged(self.experiment.codec, images, name, noise, missing)
        measured = replace(measured, value=measured.value.to(device))
        seeds, n = checked_seeds(seeds), len(measured.value)
        rows = torch.arange(n).repeat_interleave(len(seeds))
        of_rows = dict(self.conditions_of(class_label, n, conditions).map(lambda each: each[rows]))
        labels = of_rows.pop("class_labels", None)
        images = self.sample(n * seeds, labels, measurement=measured[rows], conditions=of_rows)
        return images.unflatten(0, (n, len(seeds)))

    @execution.own_numerics()
    def film(
        self,
        seeds: Iterable[int],
        class_label: ClassLabel = None,
        *,
        measurement: Measurement | None = None,
        conditions: OtherConditions = None,
        frames: int = 48,
    ) -> Tensor:
        """Frames of `sample` from prior to image: uint8 (frames, n, C, H, W), on the CPU.

        The noise levels of the frames fall geometrically, and the last frame is the image. A state
        whose root mean square exceeds that of black and white is divided by it, to be visible.
        """
        options = {"measurement": measurement, "conditions": conditions, "frames": frames}
        film, samples = self.film_and_samples(seeds, class_label, **options)
        check_ended(samples)
        return film

    @execution.own_numerics()
    def film_and_samples(
        self,
        seeds: Iterable[int],
        class_label: ClassLabel = None,
        *,
        measurement: Measurement | None = None,
        conditions: OtherConditions = None,
        frames: int = 48,
    ) -> tuple[Tensor, Tensor]:
        """The frames of `film`, and its samples (n, C, H, W), nan where one is given up."""
        method, codec = self.experiment.method, self.experiment.codec
        start = self.experiment.sampler.start
        if not isinstance(frames, (int, np.integer)) or frames < 1:
            raise ValueError(f"frames must be a whole number of at least 1, not {shown(frames)}")
        low, high = method.level_range
        high = start.level if start else high
        ratio = torch.linspace(0, 1, frames - 1, dtype=torch.float64)
        levels = high * (max(low, LOWEST_SHOWN * method.sigma_unit) / high) ** ratio
        films, samples = [], []
        for sampler, start in self._batches(seeds, class_label, measurement, conditions):
            states = States(method, levels, sampler.tells_times, codec.show)
            with self._solving(start.pop("seeds")) as watch:
                images, _ = sampler(self.experiment.network, watch=watch, callback=states, **start)
            samples.append(images)
            images = images.nan_to_num()
            film = states.end(codec.encode(images))
            end = torch.from_numpy(codec.pictures(codec.stored(images)))
            film[-1] = end.permute(0, 3, 1, 2)  # a lossy codec would show it less well
            films.append(film)
        return torch.cat(films, 1), torch.cat(samples)

    @execution.own_numerics()
    def encode(
        self, x: Tensor, class_label: ClassLabel = None, *, conditions: OtherConditions = None
    ) -> Tensor:
        """Latents (n, C, H, W) of images `x` (n, C, H, W) in [0, 1]; `decode` leads back.

        A tenth of `sampling.rtol` and `atol` bounds a step's error, since latents can be hundreds
        of times as large as images; the images of a call share their steps. A `class_label` of
        None is `sampling.class_label`, which is -1 for none. There is no guidance.

        Raises:
            ValueError: the images have another shape or lie outside [0, 1]; and as in `sample`.
            FloatingPointError: as in `sample`.
        """
        self.experiment.check_ode("encode")
        method, limits, x = self.experiment.method, self._fine_limits(), self._encoded(x)

        def latents(net: Network, part: slice, watch: Watch) -> Tensor:
            return encode(method, net, x[part], watch=watch, **limits)[0]

        return self._in_batches(latents, x, class_label, conditions)

    @execution.own_numerics()
    def decode(
        self, z: Tensor, class_label: ClassLabel = None, *, conditions: OtherConditions = None
    ) -> Tensor:
        """The images (n, C, H, W) in [0, 1] of latents `z` (n, C, H, W); see `encode`."""
        self.experiment.check_ode("decode")
        method, codec = self.experiment.method, self.experiment.codec
        check_floats(z, codec.shape, "latents")
        z, limits = z.to(self.experiment.device, torch.float32), self._fine_limits()

        def images(net: Network, part: slice, watch: Watch) -> Tensor:
            return codec.decode(solve_ode(method, net, z[part], watch=watch, **limits)[0])

        return self._in_batches(images, z, class_label, conditions)

    def log_likelihood(
        self,
        x: Tensor,
        class_label: ClassLabel = None,
        seed: int = 0,
        *,
        conditions: OtherConditions = None,
    ) -> Tensor:
        """Log density (n,), in nats, of images `x` (n, C, H, W) under the flow, in their units.

        The bits/dim of 8-bit images u are -log p / (D ln 2) + 8 at x = (u + noise) / 256, the noise
        uniform in [0, 1] (Theis et al. 2016). The divergence is that of `eval.divergence`, its
        probe drawn by `seed`. A network of latents gives their density.

        Raises as `encode`, and ValueError for a network trained at discrete noise levels.
        """
        codec = self.experiment.codec
        values = self.bits_per_dim(x, class_label, seed, conditions=conditions)
        per_entry = (math.log2(codec.levels or 1) - values) * unit_of(codec).nats
        return per_entry * math.prod(codec.shape)

    @execution.own_numerics()
    def bits_per_dim(
        self,
        x: Tensor,
        class_label: ClassLabel = None,
        seed: int = 0,
        *,
        conditions: OtherConditions = None,
    ) -> Tensor:
        """Bits/dim (n,) of images `x` (n, C, H, W) in [0, 1], as `log_likelihood` describes them.

        Of latents they are -log2 p / D; of arrays in units of their own -log p / D, nats per entry.
        """
        likelihood, x = self.experiment.likelihood, self._encoded(x)
        probes = keyed_generator(self.experiment.device, "probe", checked_seed(seed))

        def bits(net: Network, part: slice, watch: Watch) -> Tensor:
            return likelihood(net, x[part], probes, watch=watch)[0]

        return self._in_batches(bits, x, class_label, conditions)

    @execution.own_numerics()
    def denoise(
        self,
        x: Tensor,
        sigma: float | Sequence[float] | Tensor,
        class_label: ClassLabel = None,
        *,
        conditions: OtherConditions = None,
    ) -> Tensor:
        """E[image | x] (n, C, H, W) for `x` (n, C, H, W), images with noise of the level `sigma`.

        `sigma` is the standard deviation of Gaussian noise, and the scale of the Student t noise of
        PFGM++ and Poisson flow: one for all images, or one for each (n,). There is no guidance, and
        nothing is clamped. A network of training.objective='consistency' gives an image instead of
        the mean: the end of the trajectory through `x`.

        Raises:
            ValueError: `x` has another shape, `sigma` is not one of the method's noise levels, the
                network sees latents, or the method's noise depends on the image
                (`Method.check_kernel`).
        """
        check_floats(x, self.shape, "noisy images")
        self.experiment.method.check_kernel("denoise")
        method, codec = self.experiment.method, self.experiment.codec
        if math.isinf(unit := codec.noise_unit):
            raise ValueError("the network denoises latents, not images: see Method.denoise")
        low, high = (level / unit for level in method.level_range)
        levels = checked_levels(sigma, len(x), low, high) * unit
        noisy = codec.encode(x.to(self.experiment.device, codec.precision))

        def denoised(net: Network, part: slice, watch: Watch) -> Tensor:
            of_part = levels[part] if levels.dim() else levels
            return codec.unclamped(method.denoise(net, noisy[part], of_part))

        return self._in_batches(denoised, noisy, class_label, conditions)

    # --- parts ---

    def _fine_limits(self) -> dict[str, float]:
        limits = self.experiment.limits
        return limits | {name: limits[name] / 10 for name in ("rtol", "atol")}

    def _batches(
        self,
        seeds: Iterable[int],
        class_label: ClassLabel,
        measurement: Measurement | None,
        others: OtherConditions,
    ) -> Iterator[tuple[Sampler, dict]]:
        """Prior draws, generators, conditions and seeds for each batch that the sampler draws."""
        seeds, experiment = checked_seeds(seeds), self.experiment
        conditions = self._conditions(class_label, seeds, others)
        for start in range(0, len(seeds), self.at_once):
            part = slice(start, start + self.at_once)
            generators = [keyed_generator(experiment.device, "sample", s) for s in seeds[part]]
            shape = (1, *experiment.codec.shape)
            x = [experiment.method.prior_sampling(shape, g, experiment.device) for g in generators]
            sampler = experiment.sampler
            if measurement is not None:
                sampler = replace(sampler.without_fit(), measurement=measurement[part])
            yield (
                sampler,
                {
                    "x": torch.cat(x),
                    "generator": generators,
                    "conditions": conditions.map(lambda rows, part=part: rows[part]),
                    "seeds": seeds[part],
                },
            )

    @contextlib.contextmanager
    def _solving(self, seeds: Sequence[int] = ()) -> Iterator[Watch]:
        """Context of a solve: a progress bar, and the seeds in an error's message."""
        try:
            with solver_bar(self.experiment.method) as watch:
                yield watch
        except FloatingPointError as error:
            if not seeds:
                raise
            others = " and others" * (len(seeds) > 1)
            raise type(error)(f"seed {seeds[0]}{others}: {error}") from error

    def _in_batches(
        self,
        compute: Callable[[Network, slice, Watch], Tensor],
        x: Tensor,
        class_label: ClassLabel,
        others: OtherConditions,
    ) -> Tensor:
        """Results of `compute(network, part, watch)` for batches, parts of `x`, as one tensor."""
        conditions, parts = self.conditions_of(class_label, len(x), others), []
        differentiable = x.requires_grad and torch.is_grad_enabled()
        for start in range(0, len(x), self.batch_size):
            part = slice(start, start + self.batch_size)
            of_part = conditions.map(lambda rows, part=part: rows[part])
            net = conditioned(self.experiment.network, of_part)
            with self._solving() as watch, torch.set_grad_enabled(differentiable):
                parts.append(compute(net, part, watch))
        if not parts:
            raise ValueError("there are no images")
        return torch.cat(parts)

    def _encoded(self, x: Tensor) -> Tensor:
        check_shape(x, self.shape, "images")
        (codec := self.experiment.codec).check(x)
        return codec.encode(x.to(self.experiment.device, codec.precision))
