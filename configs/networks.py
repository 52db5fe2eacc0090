"""What each network needs, for `config.update(...)`."""

_UNET = {
    "normalization": "GroupNorm",
    "nonlinearity": "swish",
    "ch_mult": (1, 2, 2, 2),  # channels of each level, in units of nf; a level halves the image
    "attn_resolutions": (16,),  # attention where the image is this wide
    "resamp_with_conv": True,
    "conditional": True,  # the network sees its noise level or time
}

# NCSN++ (Song et al., ICLR 2021).
_NCSNPP = {
    **_UNET,
    "name": "ncsnpp",
    "num_res_blocks": 4,  # per level; the "deep" experiments have 8
    "resblock_type": "biggan",  # "biggan", "ddpm"
    "fir": True,  # resample with the filter fir_kernel
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,  # sums of two branches are divided by sqrt(2)
    "progressive": "none",  # "none", "output_skip", "residual"
    "progressive_input": "residual",  # "none", "input_skip", "residual"
    "progressive_combine": "sum",  # "sum", "cat"
    "fourier_scale": 16.0,
    "init_scale": 0.0,
    "attention_type": "ddpm",
    "conv_size": 3,
}
NCSNPP = {"model": _NCSNPP}

# NCSN++ for 256 x 256 and more.
NCSNPP_LARGE = {
    "model": {
        **_NCSNPP,
        "ch_mult": (1, 1, 2, 2, 2, 2, 2),
        "num_res_blocks": 2,
        "progressive": "output_skip",
        "progressive_input": "input_skip",
    }
}

# DDPM++ (same paper): NCSN++ without filters, progressive input and Fourier embedding.
DDPMPP = {
    "model": {
        **_NCSNPP,
        "embedding_type": "positional",
        "fir": False,
        "progressive_input": "none",
    }
}

# The network of DDPM (Ho et al., NeurIPS 2020).
DDPM = {"model": {**_UNET, "name": "ddpm", "num_res_blocks": 2}}
DDPM_LARGE = {"model": {**DDPM["model"], "ch_mult": (1, 1, 2, 2, 4, 4)}}

# The RefineNets of NCSN (Song and Ermon, NeurIPS 2019) and NCSNv2 (NeurIPS 2020).
_REFINENET = {
    "normalization": "InstanceNorm++",
    "nonlinearity": "elu",
    "interpolation": "bilinear",
}
NCSN = {"model": {**_REFINENET, "name": "ncsn"}}
NCSNV2_64 = {"model": {**_REFINENET, "name": "ncsnv2_64", "scale_by_sigma": True}}
NCSNV2_128 = {"model": {**_REFINENET, "name": "ncsnv2_128", "scale_by_sigma": True}}
