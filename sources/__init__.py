"""The kinds of data, by the name that `data.dataset` gives them in lower case.

A source is a sequence: `len(source)` images, of which `source[i]` reads one as uint8 (H, W, C) or
raises `base.Unreadable` with its name. A numpy array (n, H, W, C) is one. Sources can be pickled,
and every process opens the files it needs by itself (`base.PerProcess`).

A new kind of data is a function `(data, split) -> Source` and an entry here: `data` is
`config.data`, `split` "train" or "test", and the images have the size `data.image_size`, which may
be one number or (height, width), and `data.num_channels` channels, or the size and as many channels
as are stored where that is 0.
"""

from collections.abc import Callable
from functools import partial

from sources import digits, folder, images, prepared, rules, stylegan, toys
from sources.base import Source

_prepared = prepared.open_prepared

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits.open_digits,
    "folder": folder.open_folder,
    "cifar10": partial(_prepared, name="cifar10", prepare=images.resized_whole),
    "svhn": partial(_prepared, name="svhn_cropped", prepare=images.resized_whole),
    "celeba": partial(_prepared, name="celeb_a", prepare=images.face, test="validation"),
    "lsun": prepared.open_lsun,
    "celebahq": stylegan.open_faces,
    "celebahq_256": stylegan.open_faces,
    "ffhq": stylegan.open_faces,
    "ffhq_256": stylegan.open_faces,
    **{toy: partial(toys.open_toy, toy=toy) for toy in toys.TOYS},
}

# Newest rules on which files are data (`data.rules`), for data sets that have had older ones.
NEWEST_RULES = {"folder": rules.NEWEST}
