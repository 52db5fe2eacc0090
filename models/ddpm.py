"""The U-Net of DDPM: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239)."""

from functools import partial

from models.layers import group_norm
from models.ncsnpp import NCSNpp, unet_options


def create_ddpm(config, out_channels: int) -> NCSNpp:
    """NCSN++ without what it added: the blocks of DDPM, 32 groups to a norm, plain sums, images."""
    return NCSNpp(
        **unet_options(config, out_channels),
        embedding_type="positional",
        resblock_type="ddpm",
        norm=partial(group_norm, group_width=1),
        skip_rescale=False,
        init_scale=0.0,
    )
