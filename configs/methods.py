"""What each method changes: the parts that `get_default_config(...)` is given."""

import math

# Poisson flow (Xu et al., NeurIPS 2022). M, z_max and upper_norm belong to the data.
POISSON = {
    "seed": 49,
    "data": {"centered": True},
    "training": {
        "sde": "poisson",
        "batch_size": 4096,
        "small_batch_size": 128,
        "continuous": True,
        "reduce_mean": False,
        "gamma": 5.0,
        "tau": 0.03,
        "restrict_M": True,
        "eval_freq": 10000,
    },
    "model": {"sigma_end": 0.01, "ema_rate": 0.9999, "scale_by_sigma": False},
    "sampling": {"method": "ode", "ode_solver": "rk45", "N": 100, "z_min": 1e-3},
    "eval": {
        "batch_size": 1000,
        "num_samples": 10000,
        "enable_loss": False,
        "enable_sampling": False,
    },
}

# PFGM++ (Xu et al., ICML 2023), sampled in 18 steps of Heun's method: 35 evaluations.
# sigma_data and P_mean belong to the data.
PFGMPP = {
    "data": {"centered": True},
    "training": {
        "sde": "pfgmpp",
        "continuous": True,
        "reduce_mean": False,
        "target": "image",
    },
    "model": {"D": 2048.0, "P_std": 1.2, "scale_by_sigma": False},
    "sampling": {
        "method": "ode",
        "ode_solver": "heun",
        "N": 18,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
        "noise_removal": True,
    },
}

# EDM (Karras et al., NeurIPS 2022): PFGM++ with D = inf.
EDM = {
    **PFGMPP,
    "training": {**PFGMPP["training"], "sde": "edm"},
    "model": {**PFGMPP["model"], "D": math.inf},
}

# After a network: how EDM trains on CIFAR-10, and PFGM++ after it. Its 200 million images, and its
# learning rate's rise over the first 10 million, are counted in steps of 512.
EDM_TRAINING = {
    "training": {
        "batch_size": 512,
        "n_iters": 390_625,
        "snapshot_freq": 39_063,
        "eval_freq": 10_000,
    },
    "optim": {"lr": 1e-3, "warmup": 19_531, "grad_clip": -1.0},
    "model": {"dropout": 0.13, "augment_dim": 9, "ema_half_life": 500_000.0},
    "eval": {"begin_ckpt": 10, "end_ckpt": 10, "enable_sampling": True},
}

# After that: on FFHQ at 64 x 64, in steps of 256 images.
EDM_FFHQ = {
    "training": {"batch_size": 256, "n_iters": 781_250, "snapshot_freq": 78_125},
    "optim": {"lr": 2e-4, "warmup": 39_063},
    "model": {"ch_mult": (1, 2, 2, 2), "dropout": 0.05},
    "sampling": {"N": 40},
}

# Or on ImageNet at 64 x 64 with class labels: 2.5 billion images, in steps of 4,096.
EDM_IMAGENET = {
    "training": {"batch_size": 4096, "n_iters": 610_352, "snapshot_freq": 61_036},
    "optim": {"lr": 1e-4, "warmup": 2441},
    "model": {"dropout": 0.1, "augment_dim": 0, "ema_half_life": 50_000_000.0},
    "sampling": {"N": 40},
}

# Variance exploding SDE, sampled by predictor and corrector (Song et al., ICLR 2021).
VE = {
    "data": {"centered": False},
    "training": {
        "sde": "vesde",
        "continuous": True,
        "reduce_mean": False,
        "likelihood_weighting": False,
    },
    "model": {"ema_rate": 0.999, "scale_by_sigma": True},
    "sampling": {"method": "pc", "predictor": "reverse_diffusion", "corrector": "langevin"},
}

# Variance preserving SDE (same paper).
VP = {
    "data": {"centered": True},
    "training": {
        "sde": "vpsde",
        "continuous": True,
        "reduce_mean": True,
        "likelihood_weighting": False,
    },
    "model": {"ema_rate": 0.9999, "scale_by_sigma": False},
    "sampling": {"method": "pc", "predictor": "euler_maruyama", "corrector": "none"},
}

# DDPM (Ho et al., NeurIPS 2020): VP with discrete times, sampled by its own chain.
VP_DISCRETE = {
    **VP,
    "training": {**VP["training"], "continuous": False},
    "sampling": {**VP["sampling"], "predictor": "ancestral_sampling"},
}

# sub-VP SDE (Song et al., ICLR 2021).
SUBVP = {**VP, "training": {**VP["training"], "sde": "subvpsde"}}

# Score matching with annealed Langevin dynamics (Song and Ermon, NeurIPS 2019): VE with discrete
# noise levels, sampled by the corrector alone. The numbered variants add techniques of the same
# authors' NeurIPS 2020 paper: 1 largest noise level, 2 number of levels, 4 step size of the
# sampler, 5 moving average of the weights. NCSNv2 has these and 3, noise level outside the network.
SMLD = {
    "data": {"centered": False},
    "training": {
        "sde": "vesde",
        "continuous": False,
        "reduce_mean": False,
        "likelihood_weighting": False,
    },
    "optim": {"lr": 1e-3, "warmup": 0, "grad_clip": -1.0, "amsgrad": False},
    "model": {"ema_rate": 0.999, "scale_by_sigma": False},
    "sampling": {"method": "pc", "predictor": "none", "corrector": "ald", "n_steps_each": 5},
}

# After SMLD: the noise levels and the sampler of the 2019 paper, without techniques 1, 2 and 4.
SMLD_2019 = {
    "model": {"num_scales": 10, "sigma_max": 1.0},
    "sampling": {"n_steps_each": 100, "snr": 0.316},
}
