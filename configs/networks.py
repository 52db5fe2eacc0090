"""What each network needs, for `get_default_config(...)`; `default.py` explains the keys."""

_UNET = {
    "nonlinearity": "swish",
    "ch_mult": (1, 2, 2, 2),
    "attn_resolutions": (16,),
    "resamp_with_conv": True,
    "conditional": True,
}

# NCSN++ (Song et al., ICLR 2021).
_NCSNPP = {
    **_UNET,
    "name": "ncsnpp",
    "num_res_blocks": 4,
    "embedding_type": "fourier",
    "fourier_scale": 16.0,
    "resblock_type": "biggan",
    "fir": True,
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "progressive": "none",
    "progressive_input": "residual",
    "progressive_combine": "sum",
    "init_scale": 0.0,
}
NCSNPP = {"model": _NCSNPP}

# After a network: its "deep" form, and how long the same paper trains it.
DEEP = {"training": {"n_iters": 950001}, "model": {"num_res_blocks": 8}}

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

# DDPM++ and NCSN++ as EDM has them (Karras et al., NeurIPS 2022), for CIFAR-10. Published weights
# need model.augment_dim = 9, and for FFHQ at 64 x 64 ch_mult (1, 2, 2, 2) and dropout 0.05.
EDM_DDPMPP = {
    "model": {**DDPMPP["model"], "name": "edm_unet", "ch_mult": (2, 2, 2), "dropout": 0.13}
}
EDM_NCSNPP = {
    "model": {
        **EDM_DDPMPP["model"],
        "embedding_type": "fourier",
        "fir": True,
        "progressive_input": "residual",
    }
}

# ADM (Dhariwal and Nichol, NeurIPS 2021) as EDM has it for ImageNet at 64 x 64, whose published
# weights need data.num_classes = 1000.
ADM = {
    "model": {
        "name": "adm",
        "nonlinearity": "swish",
        "nf": 192,
        "ch_mult": (1, 2, 3, 4),
        "num_res_blocks": 3,
        "attn_resolutions": (32, 16, 8),
        "dropout": 0.1,
    }
}

# The network of DDPM (Ho et al., NeurIPS 2020).
DDPM = {"model": {**_UNET, "name": "ddpm", "num_res_blocks": 2}}
DDPM_LARGE = {"model": {**DDPM["model"], "ch_mult": (1, 1, 2, 2, 4, 4)}}

# The RefineNets of NCSN (Song and Ermon, NeurIPS 2019) and NCSNv2 (NeurIPS 2020).
NCSN = {"model": {"nonlinearity": "elu", "name": "ncsn"}}
NCSNV2_64 = {"model": {"nonlinearity": "elu", "name": "ncsnv2_64", "scale_by_sigma": True}}
NCSNV2_128 = {"model": {"nonlinearity": "elu", "name": "ncsnv2_128", "scale_by_sigma": True}}
