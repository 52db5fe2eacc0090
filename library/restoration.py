"""Images to restore, their measurements, and the sampler of images that agree with these."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from configs.keys import shown
from configs.schema import Flag, Key, Number, OneOf, Text, whole
from experiment_parts import Parts
from methods.restoration import RESTORE, Measurement, get_operator
from samplers.base import Sampler
from sources.arrays import read_numbers
from sources.batch import KINDS, Batch, Conditions
from sources.codec import Codec, Shape, has_pixels
from sources.dtypes import tensor_of
from sources.folder import read_images
from sources.images import cropped_then_resized, image_size_of
from sources.keyed import keyed_generator
from sources.sizes import changes, extent
from sources.stream import batch_at
from storage.digests import digests, digests_of_conditions

log = logging.getLogger(__name__)

RESTORATIONS = 5  # of each image

KEYS = {
    "sampling.restore": Key(
        "",
        OneOf(("",), "methods.restoration.RESTORE"),
        "restore the images of restore_path: 'inpaint' what restore_mask marks, 'colour' grey "
        "images, enlarge by 2, 4 or 8 ('super2' ..), 'denoise'; '': nothing",
    ),
    "sampling.restore_path": Key(
        "",
        Text(),
        "images to restore: an image, or a folder, .zip, .npy or .npz of them; '': with "
        "restore_degrade the first of the split eval.dataset, a fifth of eval.num_samples at most",
        of_machine="file",
    ),
    "sampling.restore_degrade": Key(
        False,
        Flag(),
        "the images of restore_path are whole: measure them, and compare the restorations",
    ),
    "sampling.restore_mask": Key(
        "",
        Text(),
        "missing pixels of 'inpaint': an image file that is white there, a folder or .zip of one "
        "for each image, an .npy (H, W) or (n, H, W), or a rectangle 'top,left,height,width'",
        of_machine="file",
    ),
    "sampling.restore_noise": Key(
        0.0,
        Number(0, 100),
        "standard deviation of the measurement's noise; 1 leads from black to white",
    ),
    "sampling.restorer": Key(
        "moment_matching",
        OneOf(registry="methods.restoration.RESTORERS"),
        "how: 'moment_matching' is the most exact, 'pigdm' and 'dps' are cheaper; 'replacement' "
        "is for sampling.method='pc'",
    ),
    "sampling.restore_resample": Key(
        1,
        whole(1, 1000),
        "of 'replacement': times each step is taken, as RePaint does, "
        "while the sample is at least as noisy as the measurement",
    ),
}


@dataclass(frozen=True)
class Options:
    """Options of a restoration: its images, and how they are measured.

    Attributes:
        name: one of `methods.restoration.RESTORE`.
        path: file or folder of the images; "" for those of the split.
        degrade: the images are whole, and measured here.
        mask: see `known_pixels`.
        noise: standard deviation of the measurement's noise; 1 is the range from black to white.
        split, number: of the images, if there is no path.
        scale: of 16-bit images; see `sources.sixteen_bits`.
        layout: of arrays in units of their own, `data.layout`; "" for images.
        seed: of the measurement's noise.
    """

    name: str
    path: str = ""
    degrade: bool = False
    mask: str = ""
    noise: float = 0.0
    split: str = "test"
    number: int = 1
    scale: tuple[float, ...] = ()
    layout: str = ""
    seed: int = 0


@dataclass(frozen=True)
class ToRestore:
    """Images to restore.

    Attributes:
        measurement: of n images, in the network's scaling.
        conditions: of the images, rows (n, ...); a class label of -1 is none.
        truth: the original images in [0, 1]; None where only the measurement exists.
    """

    measurement: Measurement
    conditions: Conditions
    truth: Tensor | None

    @property
    def labels(self) -> Tensor | None:
        """Class labels (n,); None without classes."""
        return self.conditions.get("class_labels")

    def numbers(self, seeds: Sequence[int]) -> list[int]:
        """The numbers of the restorations by `seeds`: seed s restores image s modulo n."""
        return [*seeds]

    def seeds(self, numbers: Sequence[int]) -> list[int]:
        """The seed of each restoration."""
        return [*numbers]

    @property
    def number(self) -> int:
        """The number of images."""
        return len(self.measurement.value)

    def arguments(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments of `Trained.sample` for these restorations."""
        rows = torch.tensor(numbers, device=self.measurement.value.device) % self.number
        conditions = dict(self.conditions.map(lambda each: each[rows]))
        return {
            "measurement": self.measurement[rows],
            "class_label": conditions.pop("class_labels", None),
            "conditions": conditions,
        }

    def origin(self, shape: Shape) -> dict[str, str]:
        """Digests of measurement, operator and conditions; `shape` is that of x, (C, H, W)."""
        ones = self.measurement.operator.forward(torch.ones(1, *shape))
        measured = digests(measurements=self.measurement.value, known=ones)
        return measured | digests_of_conditions(self.conditions)

    @classmethod
    def from_config(cls, config, experiment: Parts) -> Self:
        """The images of `sampling.restore` and the keys beside it; raises as `read`."""
        sampling, evaluation = config.sampling, config.eval
        experiment.check_ode("sampling.restore")
        options = Options(
            sampling.restore.lower(),
            sampling.restore_path,
            sampling.restore_degrade,
            sampling.restore_mask,
            sampling.restore_noise,
            evaluation.dataset,
            max(1, evaluation.num_samples // RESTORATIONS),
            config.data.scale,
            config.data.layout if config.data.dtype else "",
            config.seed,
        )
        return cls.read(options, experiment)

    @classmethod
    def read(cls, options: Options, experiment: Parts) -> Self:
        """The images that `options` name, for the network of `experiment`.

        Raises:
            ValueError: options contradict each other or the data, or an image cannot be read.
            FileNotFoundError: a file does not exist.
        """
        name, whole = options.name, options.degrade
        shape = measured_shape(experiment.codec, name, options.noise)
        if not (options.path or whole):
            raise ValueError(
                f"sampling.restore={name!r} needs sampling.restore_path, an image or more, or "
                "sampling.restore_degrade for those of the split eval.dataset"
            )
        if whole:
            shape = experiment.codec.data_shape
        batch = _batch(options, experiment, shape).to(experiment.device)
        mask = None
        if name == "inpaint":
            mask = known_pixels(options.mask, experiment.codec.shape[1:], len(batch)).to(
                experiment.device
            )
        images = experiment.codec.units(batch.images)
        measurement = measurement_of(experiment.codec, name, images, options.noise, mask)
        if whole:
            operator = measurement.operator
            value = operator.forward(experiment.codec.encode(images))
            generator = keyed_generator(experiment.device, "measurement", options.seed)
            added = torch.randn(value.shape, generator=generator, device=experiment.device)
            value = value + measurement.noise * added
            value = operator.forward(value) if name == "inpaint" else value  # of its noise too
            measurement = replace(measurement, value=value)
        restoring_sampler(experiment, measurement)  # raises ValueError for options that do not fit
        return cls(measurement, batch.conditions, images if whole else None)


def measured_shape(codec: Codec, name: str, noise: float = 0.0) -> Shape:
    """The shape (C, H, W) of what is measured of an image, by `name`, one of `RESTORE`.

    Raises:
        ValueError: such images cannot be measured so, or `noise` is 0 in denoising.
    """
    channels, *sides = codec.data_shape
    factor = RESTORE[name]
    if not has_pixels(codec):
        raise ValueError(
            f"sampling.restore={name!r} measures images, but the network sees latents of the "
            f"shape {codec.shape} (data.codec)"
        )
    if any(side % factor for side in sides):
        size = image_size_of(sides)
        raise ValueError(f"sampling.restore={name!r} does not divide data.image_size={size}")
    if name == "colour" and codec.levels is None:
        raise ValueError("sampling.restore='colour' is for images of 8 bits, not for arrays")
    if name == "colour" and channels != 3:
        raise ValueError(f"sampling.restore='colour' needs colour images; these have {channels}")
    if name == "denoise" and not noise:
        raise ValueError("sampling.restore='denoise' needs a sampling.restore_noise above 0")
    return 1 if name == "colour" else channels, *(side // factor for side in sides)


def measurement_of(
    codec: Codec, name: str, images: Tensor, noise: float = 0.0, mask: Tensor | None = None
) -> Measurement:
    """The measurement whose values are `images`, measured by `name`, one of `RESTORE`.

    Args:
        images: (n, *measured_shape), in [0, 1] up to their noise, or arrays in their own units.
        noise: its standard deviation; 1 is the range from black to white, of arrays the standard
            deviation of a channel.
        mask: bool, of the pixels that are known; see `methods.restoration.inpainting`.
    """
    operator = get_operator(name, mask)
    value = codec.encode(images)
    if name == "inpaint":
        value = operator.forward(value)  # sets the missing pixels to 0
    return Measurement(operator, value, noise * codec.noise_unit)


def damaged(
    codec: Codec, images: Tensor, name: str, noise: float = 0.0, missing: Tensor | None = None
) -> Measurement:
    """The measurement of `Trained.restore`, from images (n, *measured_shape) in [0, 1].

    `missing` is True at the pixels to fill in by "inpaint": (H, W), or (n, H, W).

    Raises:
        ValueError: no such restoration, or something has another shape.
    """
    if name not in RESTORE:
        raise ValueError(f"images are restored by one of {', '.join(RESTORE)}, not {shown(name)}")
    shape = measured_shape(codec, name, noise)
    if images.dim() != 4 or images.shape[1:] != shape or not images.is_floating_point():
        raise ValueError(
            f"images for {name!r} must be floats in [0, 1] of the shape (n, {str(shape)[1:]}, not "
            f"{images.dtype} {tuple(images.shape)}"
        )
    if (missing is not None) != (name == "inpaint"):
        raise ValueError(f"'inpaint' needs the missing pixels, and nothing else does; not {name!r}")
    if missing is None:
        return measurement_of(codec, name, images.to(codec.precision), noise)
    sides = codec.data_shape[1:]
    if missing.shape not in (sides, (len(images), *sides)):
        raise ValueError(f"missing must be bool (H, W) or (n, H, W), not {tuple(missing.shape)}")
    mask = ~missing.to(images.device, torch.bool).view(-1, 1, *sides)
    mask = mask if len(mask) > 1 else mask[0, 0]
    return measurement_of(codec, name, images.to(codec.precision), noise, mask)


def restoring_sampler(experiment: Parts, measurement: Measurement) -> Sampler:
    """The sampler of restorations; its trajectories are not those that levels are fitted to."""
    return replace(experiment.sampler.without_fit(), measurement=measurement)


def _batch(options: Options, experiment: Parts, shape: Shape) -> Batch:
    """Images as stored, (n, *shape), and the conditions that the network is given."""
    channels, *size = shape
    if options.path and options.layout:
        key, path = "sampling.restore_path", Path(options.path)
        arrays = read_numbers(key, path, (*size, channels), options.layout).values()
        stored = tensor_of(np.stack([*arrays]))
        batch = Batch(stored, _unknown_conditions(experiment, len(stored)))
    elif options.path:
        pictures = read_images("sampling.restore_path", options.path, channels, options.scale)
        sizes = [picture.shape[:2] for picture in pictures.values()]
        for change in changes(sizes, size):
            log.info(f"sampling.restore_path, images of {extent(sizes)} pixels: {change}")
        pictures = np.stack([cropped_then_resized(each, size) for each in pictures.values()])
        batch = Batch(
            torch.from_numpy(pictures).permute(0, 3, 1, 2),
            _unknown_conditions(experiment, len(pictures)),
        )
    else:
        batch = batch_at(experiment.data.get(options.split), slice(options.number))
    if not experiment.classes:
        return batch

    def of_class(label: int) -> Batch:
        labels = {"class_labels": torch.full((len(batch),), label)}
        return replace(batch, conditions=batch.conditions | labels)

    if experiment.sampler.class_label >= 0:
        return of_class(experiment.sampler.class_label)
    if batch.labels is not None:
        return batch
    if not experiment.objective.label_dropout:
        raise ValueError(
            "the classes of the images of sampling.restore_path are not known, and the network was "
            "not trained without (training.label_dropout=0): name one as sampling.class_label"
        )
    return of_class(-1)


def _unknown_conditions(experiment: Parts, n: int) -> Conditions:
    """The conditions but class labels of `n` images of which none are known.

    Raises:
        ValueError: the network was not trained without them.
    """
    names = experiment.data.condition_names
    if experiment.condition_codec:
        raise ValueError(
            "the conditions of the images of sampling.restore_path are not known "
            "(data.condition_path): restore images of the split, sampling.restore_path=''"
        )
    if not names:
        return Conditions()
    if not experiment.objective.label_dropout:
        raise ValueError(
            f"the conditions ({', '.join(names)}) of the images of sampling.restore_path are not "
            "known, and the network was not trained without (training.label_dropout=0): restore "
            "images of the split, sampling.restore_path=''"
        )
    log.info(f"sampling.restore_path: the images are restored without {', '.join(names)}")
    rows = experiment.data.conditions("train", labels=False)
    return Conditions(
        {name: row.new_full((n, *row.shape[1:]), KINDS[name].none) for name, row in rows.items()}
    )


def known_pixels(name: str, sides: tuple[int, int], n: int) -> Tensor:
    """Mask, bool, of the pixels of `n` images that `sampling.restore_mask`, `name`, does not mark.

    It is (H, W) for all images, or (n, 1, H, W) where there are n masks; `sides` are (H, W).
    """
    height, width = sides
    if not name:
        raise ValueError(
            "sampling.restore='inpaint' needs sampling.restore_mask, an image that is white where "
            "pixels are missing, or a folder of n of them for n images, or top,left,height,width "
            "of a rectangle"
        )
    if re.fullmatch(r"\d{1,9}( *, *\d{1,9}){3}", name):
        top, left, rows, columns = map(int, name.split(","))
        if top + rows > height or left + columns > width:
            within = f"{height} x {width} pixels"
            raise ValueError(f"sampling.restore_mask={name} is not within {within}")
        rectangle = torch.zeros(sides, dtype=torch.bool)
        rectangle[top : top + rows, left : left + columns] = True
        masks, white = {name: rectangle}, ""
    else:
        pictures = read_images("sampling.restore_mask", name, 1)
        white = ": values from 128 to 255 do, and True in an .npy"
        if len(pictures) not in (1, n):
            raise ValueError(
                f"sampling.restore_mask={name} holds {len(pictures)} masks for {n} images: it "
                "takes one for each, in the order of their names, or one for all"
            )
        masks = {file: torch.from_numpy(image[..., 0] >= 128) for file, image in pictures.items()}
    for file, missing in masks.items():
        which = f"sampling.restore_mask={name}" + (f": {file}" if len(masks) > 1 else "")
        if missing.shape != tuple(sides):
            pixels = " x ".join(map(str, missing.shape))
            raise ValueError(f"{which} has {pixels} pixels; the images have {height} x {width}")
        if missing.all() or not missing.any():
            share = "all pixels" if missing.all() else "no pixel"
            raise ValueError(f"{which} marks {share} as missing{white}")
    if len(masks) == 1:
        return ~next(iter(masks.values()))
    log.info(f"sampling.restore_mask: {n} masks, one for each image, in the order of their names")
    return ~torch.stack([*masks.values()])[:, None]
