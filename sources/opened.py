"""The data of a config, opened: where they lie, how they are split, and what is measured."""

import functools
from functools import partial
from pathlib import Path

import torch
from ml_collections import ConfigDict
from tqdm import tqdm

import distributed
import sources
from configs import keys
from sources import digests, folder, moments, pairs, prior, splits
from sources.arrays import Arrays, is_array
from sources.base import Classes, Source, View
from sources.encoded import cached_latents
from sources.files import Measured
from sources.folder import Folder
from sources.identity import digest_of
from sources.images import ImageSize, Shape, image_size_of, sides_of
from sources.labels import only
from sources.latents import Latents
from sources.loaded import Loaded
from sources.moments import Moments
from sources.pairs import Pairs
from sources.sizes import extent, shapes_of
from sources.stream import DataSet, Stream, resident

SPLITS = ("train", "test")
MEASURED = 64  # images of which channels and sizes are measured


class OpenedData:
    """The data that `options`, a config's `data`, name; each split is opened when it is needed.

    Values that `options` leave open are measured, and may be filled in later.
    """

    def __init__(self, options: ConfigDict):
        self.options = options
        self._folder: Folder | Arrays | Loaded | None = None
        self._pairs: Pairs | None = None
        self._sources: dict[str, Source] = {}
        self._classes: dict[str, Classes] = {}
        self._prior_latents: DataSet | None = None

    @property
    def name(self) -> str:
        """Name of the data set, with the category where it has several."""
        category = self.options.get("category")
        return self.options.dataset.lower() + (f"_{category}" if category else "")

    @property
    def whole_shape(self) -> Shape:
        """(C, H, W) of an image."""
        channels = self.options.num_channels or self.measure_channels()
        return channels, *sides_of(self.options.image_size or self.measure_size())

    @property
    def takes_scale(self) -> bool:
        """True where `data.scale` makes 8 bits of 16: image files that are no numbers of a type."""
        path = self.options.path if self._is_folder and not self.options.dtype else ""
        return bool(path) and not is_array(Path(path))

    @property
    def are_arrays(self) -> bool:
        """True where the data are an .npy or .npz, whose numbers may be in units of their own."""
        return self._is_folder and is_array(Path(self.options.path))

    @property
    def has_pairs(self) -> bool:
        """True where each image has a condition, at `data.condition_path`."""
        return bool(self.options.condition_path)

    def _conditions_of(self, split: str) -> View:
        """The conditions of the images of `split`, as stored."""
        if not self._is_folder:
            raise ValueError(
                f"{pairs.PATH} belongs to the images of data.dataset='folder', not of "
                f"{self.options.dataset!r}"
            )
        if self._pairs is None:
            self._pairs = Pairs(self.options, self._find())
        return self._pairs.of_split(self.options, split, self._source(split))

    # --- the prior of methods that lead from one data set to another ---------------------------

    @functools.cached_property
    def _prior(self) -> "OpenedData":
        return OpenedData(prior.options_of(self.options))

    @functools.cached_property
    def prior_digest(self) -> str:
        """Digest of the prior's training images (`digests.of_source`)."""
        return digests.of_source(self._prior._source("train"))

    def prior_images(self) -> DataSet:
        """The training images of `data.prior_dataset`, as stored."""
        return self._held(Stream(self._prior._source("train"), self.whole_shape))

    def prior_latents(self, images: DataSet, codec: Latents, device: torch.device | str) -> DataSet:
        """Latents of the `prior_images`, encoded at the first call, before they are scaled."""
        if self._prior_latents is None:
            latents = cached_latents(images, digest_of(images), codec, False, device)
            self._prior_latents = self._held(Stream(latents, codec.shape))
        return self._prior_latents

    def _held(self, stream: Stream) -> DataSet:
        return resident(stream, self.options.resident_bytes)

    # --- splits and classes ---------------------------------------------------------------------

    @property
    def _is_folder(self) -> bool:
        return sources.SOURCES.get(self.options.dataset.lower()) is folder.open_folder

    @property
    def split_words(self) -> str:
        """Text on how the data are split; "" for a named data set that is split as by default."""
        data = self.options
        if self._is_folder:
            if names := self._find().split_names:
                return "{train} and {test}".format(**names)
            return splits.in_words(data.held_out, self._find().by_name, data.groups)
        source = sources.SOURCES.get(data.dataset.lower())
        if data.held_out == splits.SHARE or "data.held_out" not in keys.of_part(source, "reads"):
            return ""
        return splits.in_words(data.held_out, by_name=False)

    def _find(self) -> Folder | Arrays | Loaded:
        """The images at `data.path`, listed at the first call."""
        if self._folder is None:
            self._folder = folder.find(self.options)
        return self._folder

    def _open(self, split: str, channels: int, size: ImageSize) -> Source:
        """The images of `split` with `channels` and `size`; 0: those that are stored."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        name = self.options.dataset
        open_split = keys.named(sources.SOURCES, "data.dataset", name)
        if self._is_folder:
            open_split = self._find().open
        options = self.options.copy_and_resolve_references()
        with options.ignore_type():  # a size may be one number or two
            options.num_channels, options.image_size = channels, size
        source = open_split(options, split)
        if options.classes:
            source = only(source, options.classes)
        if not len(source):
            raise ValueError(f"{name} holds no images for the split {split}")
        return source

    def _source(self, split: str) -> Source:
        if split not in self._sources:
            channels, *sides = self.whole_shape
            self._sources[split] = self._open(split, channels, image_size_of(sides))
        return self._sources[split]

    def _read_classes(self, split: str) -> Classes:
        if split not in self._classes:
            source = self._source(split)
            message = (
                f"data.num_classes asks for class labels, which {self.options.dataset} does not "
                f"give ({split} split)"
            )
            if not hasattr(source, "classes"):
                raise ValueError(message)
            try:
                self._classes[split] = source.classes()
            except ValueError as error:
                raise ValueError(f"{message}: {error}") from error
        return self._classes[split]

    # --- measured values ------------------------------------------------------------------------

    def measure_channels(self) -> int:
        """Channels of the training images: 1 where up to `MEASURED` of them are grey, else 3.

        Grey images have R = G = B in every pixel. Arrays keep the channels they are stored with.
        """
        return max(channels for *_, channels in self._measured_shapes)

    def measure_size(self) -> ImageSize:
        """The size of up to `MEASURED` training images; ValueError where these differ."""
        sizes = {(height, width) for height, width, _ in self._measured_shapes}
        if len(sizes) > 1:
            raise ValueError(
                f"data.image_size=0 takes images as they are, but these have {extent([*sizes])} "
                "pixels: set it to one size, to which they are cut and resized"
            )
        return image_size_of(*sizes)

    @functools.cached_property
    def _measured_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes (H, W, C) of up to `MEASURED` training images, spread over the split."""
        return shapes_of(self._open("train", 0, self.options.image_size), MEASURED)

    def measure_scale(self) -> Measured:
        """The `data.scale` of 16-bit images of either split; () where there are no such files."""
        if not (self.takes_scale and folder.exists(self.options.path)):
            return Measured(())
        return self._find().measure_scale(_watch("range of 16-bit images"))

    def measure_dtype(self) -> str:
        """The `data.dtype` of an .npy or .npz; "" of 8-bit images, and where there is no file."""
        path = Path(keys.with_home("data.path", self.options.path))
        return self._find().dtype() if self.are_arrays and path.exists() else ""

    def measure_moments(self) -> Moments:
        """The moments of the training images, by `data.scale`."""
        watch = _watch("mean and deviation")
        return moments.measure(self._source("train"), self.options.scale, watch)

    def measure_conditions(self) -> tuple[dict, str]:
        """The keys of `sources.pairs` measured on the training split, and a line for the log."""
        conditions = self._conditions_of("train")
        watch = _watch("mean and deviation")
        values, line = pairs.measure(conditions, self._pairs.dtype(self.options), watch)
        return values, line + self._pairs.clipping(self.options)

    def measure_classes(self) -> int:
        """Number of classes of the training images: with names, or as many as labels need."""
        classes = self._read_classes("train")
        return max(len(classes.names), int(classes.labels.max()) + 1)


def _watch(name: str) -> partial:
    """A progress bar, called `name`, over a loop on images; of several processes the main one's."""
    return partial(tqdm, desc=name, unit="image", delay=1, disable=not distributed.is_main())
