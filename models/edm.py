"""The networks of EDM: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
Models" (arXiv 2206.00364), appendix F.6. They take noise labels of either sign.
"""

from collections.abc import Sequence
from functools import partial
from typing import Self

from torch import Tensor, nn

from models.layers import MultiHeadAttention, PositionalFeatures, ResBlock, group_norm, one_hot
from models.ncsnpp import NCSNpp, unet_options


class EDMUNet(NCSNpp):
    """EDM's DDPM++ and NCSN++: Song's, with the noise label itself in 'fourier' features."""

    def __init__(self, **options):
        super().__init__(**options, attention=MultiHeadAttention, log_label=False)


class ADM(NCSNpp):
    """The U-Net of Dhariwal and Nichol (arXiv 2105.05233), appendix B, as EDM has it.

    The embedding scales and shifts after the norms, attention has heads of 64 channels (there is
    none in narrower features), and sums are plain. Arguments are as of `NCSNpp`.
    """

    @classmethod
    def from_config(cls, config, out_channels: int) -> Self:
        """The network that `config.model` describes; see `NETWORKS`."""
        return cls(**unet_options(config, out_channels) | {"conditional": True})

    def __init__(self, *, nf: int = 192, ch_mult: Sequence[int] = (1, 2, 3, 4), **options):
        super().__init__(
            nf=nf,
            ch_mult=ch_mult,
            **options,
            skip_rescale=False,
            norm=partial(group_norm, eps=1e-5),
            attention=_attention,
            block=partial(ResBlock, adaptive_scale=True, resample_conv=False),
            stem_width=nf * ch_mult[0],
            attend_throughout=True,
        )
        self.features = PositionalFeatures(nf, endpoint=False)
        if self.num_classes:
            self.label_embedding = nn.Linear(self.num_classes, 4 * nf, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
        if self.num_classes:
            nn.init.normal_(self.label_embedding.weight)
        last = [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        last += [m.proj for m in self.modules() if isinstance(m, MultiHeadAttention)]
        for layer in (*last, self.head.conv, self.augment_embedding):
            for parameter in layer.parameters() if layer is not None else ():
                nn.init.zeros_(parameter)

    def embed(
        self,
        features: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        if augment_labels is not None:
            features = features + self.augment_embedding(augment_labels.to(features))
        emb = self.dense2(self.act(self.dense1(features)))
        if self.label_embedding is None:
            return emb
        return emb + self.label_embedding(one_hot(class_labels, self.num_classes, emb))


def _attention(channels: int, **options) -> nn.Module:
    return (
        MultiHeadAttention(channels, head_width=64, **options) if channels >= 64 else nn.Identity()
    )
