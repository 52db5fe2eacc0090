"""The networks of EDM (Karras et al. 2022, arXiv 2206.00364, appendix F.6).

They take noise labels of either sign.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.layers import MultiHeadAttention, PositionalFeatures, ResBlock, group_norm
from models.ncsnpp import UNET, NCSNpp


class EDMUNet(NCSNpp):
    """EDM's DDPM++ and NCSN++: those of score SDEs, without a log in the 'fourier' features."""

    fixed = {"attention": MultiHeadAttention, "log_label": False}


def _attention(channels: int, **options) -> nn.Module:
    if channels < 64:
        return nn.Identity()
    return MultiHeadAttention(channels, head_width=64, **options)


class ADM(NCSNpp):
    """The U-Net of Dhariwal and Nichol (arXiv 2105.05233), appendix B, as EDM has it.

    The embedding scales and shifts after the norms, attention has heads of 64 channels (there is
    none in narrower features), and sums are plain.
    """

    keys = UNET
    fixed = {
        "embedding_type": "positional",
        "conditional": True,
        "resblock_type": "biggan",
        "fir_kernel": None,
        "progressive": "none",
        "progressive_input": "none",
        "skip_rescale": False,
        "norm": partial(group_norm, eps=1e-5),
        "attention": _attention,
        "block": partial(ResBlock, adaptive_scale=True, resample_conv=False),
        "attend_throughout": True,
    }

    def __init__(self, *, nf: int, ch_mult: Sequence[int], **options):
        super().__init__(nf=nf, ch_mult=ch_mult, stem_width=nf * ch_mult[0], **options)
        self.features = PositionalFeatures(nf, endpoint=False)
        if self.num_classes:
            self.label_embedding = nn.Linear(self.num_classes, 4 * nf, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
            if name.endswith(("conv2", "proj", "head.conv", "augment_embedding")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        if self.num_classes:
            nn.init.normal_(self.label_embedding.weight)

    def embed(
        self, features: Tensor, classes: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        emb = super().embed(features, None, augment_labels)
        return emb if classes is None else emb + self.label_embedding(classes)
