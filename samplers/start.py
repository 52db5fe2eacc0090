"""Samples that start from their condition instead of a draw of the prior.

Source: Hein et al. 2023 (PPFM, arXiv 2312.09754), for low-dose CT in one evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from configs.schema import NOISE_LEVEL, SHARE, Key, OneOf
from methods.base import Method
from sources.codec import Codec
from sources.pairs import codec_of, is_alike

KEYS = {
    "sampling.init": Key(
        "prior",
        OneOf(("prior", "condition")),
        "where samples start: at a draw of the prior, or at the condition itself, taken as the "
        "image at the noise level init_level (PPFM), for conditions that are like the data",
    ),
    "sampling.init_level": Key(
        0.5,
        NOISE_LEVEL,
        "sampling.init='condition': noise level at which the condition counts as the noisy image, "
        "for data of standard deviation 0.5",
        scales="level",
    ),
    "sampling.init_weight": Key(
        1.0,
        SHARE,
        "sampling.init='condition': w of the result w f + (1 - w) c, f the sample, c the condition",
    ),
}


@dataclass(frozen=True)
class ConditionStart:
    """The start of samples at their conditions.

    Attributes:
        level: noise level of the start.
        weight: of the sample in the result, a weighted mean of sample and condition.
        codec: of the conditions.
    """

    level: float
    weight: float
    codec: Codec

    @classmethod
    def from_config(cls, config, method: Method, codec: Codec) -> Self | None:
        """The start of `config.sampling`; None for draws of the prior.

        Raises ValueError where the conditions are not like the data, or the level is none of the
        method.
        """
        sampling, conditions = config.sampling, codec_of(config.data)
        if sampling.init == "prior":
            return None
        if conditions is None or not is_alike(conditions, codec):
            has = "there are none" if conditions is None else f"they have {conditions.data_shape}"
            has += f" of {conditions.dtype}" if conditions else ""
            raise ValueError(
                f"sampling.init='condition' needs conditions (data.condition_path) of the shape "
                f"{codec.data_shape} (C, H, W) and the units of the data, {codec.dtype}: {has}"
            )
        low, high = method.level_range
        if not low < sampling.init_level <= high:
            raise ValueError(
                f"sampling.init_level={sampling.init_level:g} must be a noise level above {low:g} "
                f"and up to {high:g}"
            )
        return cls(sampling.init_level, sampling.init_weight, conditions)

    def image(self, conditions: Mapping[str, Tensor], codec: Codec) -> Tensor:
        """The conditions (B, C, H, W) as `codec`, that of the data, encodes them.

        Raises ValueError where there are none.
        """
        if (image := conditions.get("image")) is None:
            raise ValueError("sampling.init='condition': the samples have no condition")
        return codec.encode(self.codec.unclamped(image).to(codec.precision))
