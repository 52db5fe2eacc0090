"""The U-Net of DDPM: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239)."""

from models.ncsnpp import NCSNpp


class DDPM(NCSNpp):
    """NCSN++ without what it added: the blocks of DDPM, 32 groups to a norm, plain sums and images.

    Takes the arguments of `NCSNpp` that remain, and is called like it.
    """

    def __init__(self, **options):
        super().__init__(
            embedding_type="positional",
            resblock_type="ddpm",
            group_width=1,
            skip_rescale=False,
            init_scale=0.0,
            **options,
        )
