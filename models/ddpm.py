"""The U-Net of DDPM: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239)."""

from typing import Self

from models.ncsnpp import NCSNpp, unet_options


class DDPM(NCSNpp):
    """NCSN++ without what it added: the blocks of DDPM, 32 groups to a norm, plain sums and images.

    Takes the arguments of `NCSNpp` that remain, and is called like it.
    """

    @classmethod
    def from_config(cls, config, out_channels: int) -> Self:
        """The network that `config.model` describes; see `NETWORKS`."""
        return cls(**unet_options(config, out_channels))

    def __init__(self, **options):
        super().__init__(
            embedding_type="positional",
            resblock_type="ddpm",
            group_width=1,
            skip_rescale=False,
            init_scale=0.0,
            **options,
        )
