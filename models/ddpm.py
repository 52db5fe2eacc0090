"""The U-Net of DDPM: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239)."""

from models.ncsnpp import NCSNpp, unet_options


def create_ddpm(config, out_channels: int) -> NCSNpp:
    """NCSN++ without what it added: the blocks of DDPM, 32 groups to a norm, plain sums, images."""
    return NCSNpp(
        **unet_options(config, out_channels),
        embedding_type="positional",
        resblock_type="ddpm",
        group_width=1,
        skip_rescale=False,
        init_scale=0.0,
    )
