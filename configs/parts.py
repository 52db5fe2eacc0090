"""The parts that an experiment is put together from: a data set, a method, a network.

A part is a dict of what differs from `default.py`, which explains the keys, or a function that
sets it, where a value follows from another one.
"""

import math
from collections.abc import Callable

from ml_collections import ConfigDict

from configs.default import get_default_config

Part = dict | Callable[[ConfigDict], None]


def experiment(*parts: Part) -> ConfigDict:
    """Return a new, locked config: the defaults, changed by the `parts`; later ones win.

    Raises:
        AttributeError, KeyError: a part sets a key that `default.py` does not have.
        TypeError: a part gives a key another type.
    """
    config = get_default_config()
    for part in parts:
        if callable(part):
            part(config)
        else:
            config.update(part)
    return config


# --- data sets ------------------------------------------------------------------------------------

CIFAR10 = {  # 32 x 32
    "data": {"dataset": "CIFAR10"},
    "training": {"M": 291},
    "sampling": {"z_max": 40.0, "upper_norm": 3000.0},
    "eval": {"begin_ckpt": 9},
}
CELEBA = {
    "data": {"dataset": "CELEBA", "image_size": 64},
    "training": {"M": 291},
    "model": {"sigma_max": 90.0},
    "sampling": {"snr": 0.17, "z_max": 60.0, "z_exp": 1.0, "upper_norm": 6000.0},
    "eval": {"enable_sampling": True},
}

# The experiment names the category; other data of 256 x 256 and more start here too.
LSUN = {
    "data": {"dataset": "LSUN", "image_size": 256},
    "training": {"batch_size": 64, "n_iters": 2400001, "snapshot_freq_for_preemption": 5000},
    "model": {"dropout": 0.0, "num_scales": 2000, "sigma_max": 378.0},
    "sampling": {"snr": 0.075},
    "eval": {"begin_ckpt": 50, "end_ckpt": 96, "batch_size": 512, "enable_sampling": True},
}

# After LSUN, VE and NCSNPP_LARGE: CelebA-HQ and FFHQ, 1024 x 1024.
FACES_1024 = {
    "data": {"image_size": 1024},
    "training": {"batch_size": 8},
    "model": {
        "ema_rate": 0.9999,
        "nf": 16,
        "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32),
        "num_res_blocks": 1,
        "sigma_max": 1348.0,
    },
    "sampling": {"snr": 0.15},
    "eval": {"begin_ckpt": 1, "batch_size": 1024},
}


def digits(config: ConfigDict) -> None:
    """scikit-learn's digits, 8 x 8 grey, after method and network: two CPU cores train them."""
    config.data.update(dataset="digits", image_size=8, num_channels=1, random_flip=False)
    config.training.update(n_iters=2000, log_freq=20, eval_freq=200)
    config.training.snapshot_freq_for_preemption = 200
    config.training.M = 261  # M, z_max and upper_norm as hyper_parameters.py measures them
    config.sampling.update(z_max=17.9, upper_norm=179.0)
    config.sampling.update(method="ode", ode_solver="heun", N=18)  # 35 evaluations
    config.optim.lr = 1e-3
    config.model.update(nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
    config.model.update(dropout=0.0, ema_rate=0.995)
    config.model.sigma_max = 5.0  # the largest distance of two digits (arXiv 2006.09011)
    config.model.sigma_data = 0.75  # standard deviation of the scaled images' entries
    config.model.P_mean = -0.8  # larger than published by the log of 0.75 / 0.5
    config.eval.update(batch_size=500, num_samples=1000, features="pixels")
    config.eval.update(enable_loss=True, enable_bpd=True, enable_sampling=True)
    share_of_steps(config, snapshots=4)


def toy(config: ConfigDict) -> None:
    """Points of the plane, after method and network: seconds on a CPU; a `data.dataset` of TOYS."""
    config.data.update(dataset="heart", image_size=1, num_channels=2, random_flip=False)
    config.training.update(batch_size=512, n_iters=600, log_freq=25, eval_freq=200, gamma=0.1)
    config.training.M = 260  # perturbations reach far, so that all of the data is a point there
    config.sampling.update(z_max=17.0, z_min=2e-3, z_exp=0.02, upper_norm=500.0)
    config.sampling.radius = math.sqrt(2)  # in the plane many field lines are nearly flat
    config.optim.lr = 2e-3
    config.model.update(nf=128, num_res_blocks=3, ema_rate=0.99)
    config.model.sigma_max = 2.0  # the largest distance of two points
    config.model.sigma_data = 0.4  # standard deviation of the coordinates
    config.model.beta_max = 8.0  # VP: sigma / alpha of up to 7.5, 19 times sigma_data
    config.eval.update(batch_size=1000, num_samples=2000, features="pixels")
    config.eval.update(enable_loss=True, enable_bpd=True, enable_sampling=True)
    config.eval.update(bpd_num_repeats=1, divergence="exact")
    share_of_steps(config, snapshots=1)


def images(config: ConfigDict) -> None:
    """The user's own images, small, after method and network: for one small GPU or, slowly, a CPU.

    There is a checkpoint at each tenth, and the EMA weights average over about as many steps. Noise
    levels follow the standard deviation of the images, or for VE the distances between them.
    """
    config.data.update(dataset="folder", num_channels=0, random_flip=False)
    config.training.update(batch_size=128, small_batch_size=0, n_iters=50000, eval_freq=500)
    config.training.snapshot_freq_for_preemption = 1000
    config.optim.lr = 5e-4
    config.model.update(nf=64, ch_mult=(1, 2, 2), num_res_blocks=2)
    config.model.update(sigma_data=None, P_mean=None, sigma_max=None)
    config.sampling.update(method="ode", ode_solver="multistep", N=20, sigma_max=None)
    config.eval.update(batch_size=100, num_samples=1000, features="pixels")
    config.eval.update(enable_loss=True, enable_sampling=True)
    share_of_steps(config, snapshots=10)
    n_iters = config.training.get_ref("n_iters").to_float()
    config.model.ema_rate = n_iters / (n_iters + 10.0)


def quick(config: ConfigDict) -> None:
    """PFGM++ in minutes on a CPU, after method, network and data, some of whose values it replaces.

    A thin network comes close to a wide one in less computing (docs/benchmarks.md, "The demo"). Its
    target is the posterior mean over the batch of 4,096, which has no variance where that is all of
    the training images, and else the bias of a subset (Xu et al. 2023, arXiv 2302.00670). The
    learning rate falls from the beginning, in place of a long EMA.
    """
    config.training.update(target="posterior_mean", batch_size=4096, small_batch_size=64)
    config.model.update(nf=16, num_res_blocks=1, dropout=0.0, ema_rate=0.98)
    config.optim.lr = 4e-3
    share_of_steps(config, snapshots=12, cooldown=95)


def demo(config: ConfigDict) -> None:
    """The steps and the width of `make demo`, after `quick`."""
    config.training.update(n_iters=1500, precision="auto")
    config.optim.optimizer = "Muon"
    config.model.ch_mult = (1, 3)
    config.eval.bpd_num_repeats = 1


def consistency(config: ConfigDict) -> None:
    """Fine-tune a trained network for samples in one or two evaluations; the last part.

    The two noisy images of a pair are joined by an Euler step of the ODE of the reference batch.
    Where that is all of the data, as with the digits, their difference has no noise that would bias
    a Euclidean distance, so that `c` can be small. Samples start at a noise level above which
    training has only 2 % of its examples, and the network is worse.
    Bits/dim, which follow the ODE, are left out of the evaluation.
    """
    config.training.update(objective="consistency", target="posterior_mean")
    config.training.update(batch_size=4096, small_batch_size=64)
    config.consistency.c = 0.01
    config.sampling.update(method="consistency", N=2, sigma_max=20.0)
    config.eval.enable_bpd = False


def share_of_steps(config: ConfigDict, snapshots: int, cooldown: int = 30) -> None:
    """Make keys that count steps a share of `training.n_iters`, also where that is overridden.

    The run has at most `snapshots` checkpoints at equal distances; the last of these is evaluated.
    The learning rate falls over the last `cooldown` per cent.
    """
    n_iters = config.training.get_ref("n_iters")
    config.training.snapshot_freq = (n_iters + (snapshots - 1)) // snapshots
    freq = config.training.get_ref("snapshot_freq")
    config.eval.steps = "last"
    for key in ("begin_ckpt", "end_ckpt"):  # of an evaluation with eval.steps=''
        config.eval[key] = (n_iters + freq - 1) // freq
    config.optim.warmup = n_iters // 40
    config.optim.cooldown = n_iters * cooldown // 100


# --- methods --------------------------------------------------------------------------------------

# Poisson flow (Xu et al., NeurIPS 2022). M, z_max and upper_norm belong to the data.
POISSON = {
    "seed": 49,
    "training": {
        "sde": "poisson",
        "batch_size": 4096,
        "small_batch_size": 128,
        "eval_freq": 10000,
    },
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
    "training": {"sde": "pfgmpp"},
    "sampling": {"ode_solver": "heun", "N": 18},
}

# EDM (Karras et al., NeurIPS 2022): PFGM++ with D = inf.
EDM = {
    "training": {"sde": "edm"},
    "model": {"D": math.inf},
    "sampling": {"ode_solver": "heun", "N": 18},
}

# Rectified flow and TrigFlow, which takes EDM's noise levels in training (arXiv 2410.11081).
FLOW = {
    "training": {"sde": "flow"},
    "model": {"D": math.inf},
    "sampling": {"ode_solver": "heun", "N": 18},
}
TRIGFLOW = {**FLOW, "training": {"sde": "trigflow"}, "flow": {"times": "edm"}}

# EDM's preconditioning of VP, VE and iDDPM (Karras et al., NeurIPS 2022, table 1), sampled as EDM
# samples them: its improved sampler between the ends of their noise levels.
EDM_VP = {**EDM, "training": {"sde": "edm_vp"}}
EDM_VE = {**EDM, "training": {"sde": "edm_ve"}, "sampling": {**EDM["sampling"], "sigma_min": 0.02}}
IDDPM = {**EDM, "training": {"sde": "iddpm"}, "sampling": {**EDM["sampling"], "sigma_min": 0.0064}}

# After a network: how EDM trains on CIFAR-10, and PFGM++ after it. Its 200 million images, and its
# learning rate's rise over the first 10 million, are counted in steps of 512.
EDM_TRAINING = {
    "data": {"random_flip": False},
    "training": {
        "augment": 0.12,
        "batch_size": 512,
        "n_iters": 390_625,
        "snapshot_freq": 39_063,
        "eval_freq": 10_000,
        "label_dropout": 0.0,
    },
    "optim": {"lr": 1e-3, "warmup": 19_531, "grad_clip": -1.0, "nonfinite": "replace"},
    "model": {"dropout": 0.13, "augment_dim": 9, "ema_half_life": 500_000.0},
    "eval": {"begin_ckpt": 10, "end_ckpt": 10, "enable_sampling": True},
}

# After that: on FFHQ at 64 x 64, a folder or zip at data.path, in steps of 256 images.
EDM_FFHQ = {
    "data": {"dataset": "folder", "image_size": 64},
    "training": {"batch_size": 256, "n_iters": 781_250, "snapshot_freq": 78_125, "augment": 0.15},
    "optim": {"lr": 2e-4, "warmup": 39_063},
    "model": {"ch_mult": (1, 2, 2, 2), "dropout": 0.05},
    "sampling": {"N": 40},
}

# Or on ImageNet at 64 x 64 with class labels: 2.5 billion images, in steps of 4,096.
EDM_IMAGENET = {
    "data": {
        "dataset": "folder",
        "image_size": 64,
        "num_classes": 1000,
    },
    "training": {
        "batch_size": 4096,
        "n_iters": 610_352,
        "snapshot_freq": 61_036,
        "augment": 0.0,
    },
    "optim": {"lr": 1e-4, "warmup": 2441},
    "model": {"dropout": 0.1, "augment_dim": 0, "ema_half_life": 50_000_000.0},
    "sampling": {"N": 40},
}

# To be combined with the network EDM2: how EDM2-XS trains on ImageNet at 64 x 64 (Karras et al.
# 2024, arXiv 2312.02696, table 6), in steps of 2,048: about a billion images, of which the first 10
# million raise the learning rate. EMA weights of any length come from the averages (eval.ema_std).
EDM2_TRAINING = {
    "data": {"random_flip": False, "dataset": "folder", "image_size": 64, "num_classes": 1000},
    "training": {
        "objective": "uncertainty",
        "batch_size": 2048,
        "n_iters": 524_288,
        "snapshot_freq": 32_768,
        "eval_freq": 10_000,
        "label_dropout": 0.0,
    },
    "optim": {
        "lr": 0.012,
        "beta2": 0.99,
        "warmup": 4883,
        "decay_from": 35_000,
        "grad_clip": -1.0,
        "nonfinite": "replace",
    },
    "model": {"P_mean": -0.8, "P_std": 1.6, "ema_stds": (0.05, 0.1)},
    "sampling": {"N": 32},
    "eval": {"begin_ckpt": 16, "end_ckpt": 16, "enable_sampling": True},
}

# After EDM_TRAINING: consistency tuning of an EDM or PFGM++ network on CIFAR-10 (Geng et al. 2024,
# arXiv 2406.14548), 200,000 steps in 8 stages.
ECT = {
    "training": {
        "objective": "consistency",
        "augment": 0.0,
        "batch_size": 128,
        "n_iters": 200_000,
        "snapshot_freq": 20_000,
    },
    "optim": {"optimizer": "RAdam", "lr": 1e-4, "warmup": 0},
    "model": {"dropout": 0.2, "ema_half_life": 0.0, "ema_rate": 0.9999},
    "consistency": {"c": 0.0},
    "sampling": {"method": "consistency", "N": 2, "levels": (0.821,)},
}

# Electrostatic field matching (Kolesov et al., ICML 2025), after network and data.
EFM = {
    "training": {"sde": "efm"},
    "sampling": {"method": "field_lines", "rtol": 1e-3, "atol": 1e-3},
    "eval": {"enable_bpd": False},
}

# Variance exploding SDE, sampled by predictor and corrector (Song et al., ICLR 2021).
VE = {
    "data": {"centered": False},
    "training": {"sde": "vesde"},
    "model": {"ema_rate": 0.999, "scale_by_sigma": True},
    "sampling": {"method": "pc", "predictor": "reverse_diffusion", "corrector": "langevin"},
}

# Variance preserving and sub-VP SDE (same paper).
VP = {"training": {"sde": "vpsde", "reduce_mean": True}, "sampling": {"method": "pc"}}
SUBVP = {"training": {"sde": "subvpsde", "reduce_mean": True}, "sampling": {"method": "pc"}}

# DDPM (Ho et al., NeurIPS 2020): VP with discrete times, sampled by its own chain.
VP_DISCRETE = {
    "training": {"sde": "vpsde", "reduce_mean": True, "continuous": False},
    "sampling": {"method": "pc", "predictor": "ancestral_sampling"},
}

# Score matching with annealed Langevin dynamics (Song and Ermon, NeurIPS 2019): VE with discrete
# noise levels, sampled by the corrector alone. The numbered variants add techniques of the same
# authors' NeurIPS 2020 paper: 1 largest noise level, 2 number of levels, 4 step size of the
# sampler, 5 moving average of the weights. NCSNv2 has these and 3, noise level outside the network.
SMLD = {
    "data": {"centered": False},
    "training": {"sde": "vesde", "continuous": False},
    "optim": {"lr": 1e-3, "warmup": 0, "grad_clip": -1.0},
    "model": {"ema_rate": 0.999},
    "sampling": {"method": "pc", "predictor": "none", "corrector": "ald", "n_steps_each": 5},
}

# After SMLD: the noise levels and the sampler of the 2019 paper, without techniques 1, 2 and 4.
SMLD_2019 = {
    "model": {"num_scales": 10, "sigma_max": 1.0},
    "sampling": {"n_steps_each": 100, "snr": 0.316},
}

# --- networks -------------------------------------------------------------------------------------

# NCSN++ (Song et al., ICLR 2021), with either embedding of the noise level.
NCSNPP = {"model": {"name": "ncsnpp", "progressive_input": "residual"}}
NCSNPP_POSITIONAL = {"model": {**NCSNPP["model"], "embedding_type": "positional"}}

# NCSN++ for 256 x 256 and more.
NCSNPP_LARGE = {
    "model": {
        "name": "ncsnpp",
        "ch_mult": (1, 1, 2, 2, 2, 2, 2),
        "num_res_blocks": 2,
        "progressive": "output_skip",
        "progressive_input": "input_skip",
    }
}

# DDPM++ (same paper): NCSN++ without filters, progressive input and Fourier embedding.
DDPMPP = {"model": {"name": "ncsnpp", "embedding_type": "positional", "fir": False}}

# A few layers without convolutions, for points.
MLP = {"model": {"name": "mlp"}}

# DDPM++ and NCSN++ as EDM has them (Karras et al., NeurIPS 2022), for CIFAR-10. Published weights
# need model.augment_dim = 9, and for FFHQ at 64 x 64 ch_mult (1, 2, 2, 2) and dropout 0.05.
EDM_DDPMPP = {
    "model": {**DDPMPP["model"], "name": "edm_unet", "ch_mult": (2, 2, 2), "dropout": 0.13}
}
EDM_NCSNPP = {
    "model": {
        **NCSNPP["model"],
        "name": "edm_unet",
        "ch_mult": (2, 2, 2),
        "dropout": 0.13,
    }
}

# ADM (Dhariwal and Nichol, NeurIPS 2021) as EDM has it for ImageNet at 64 x 64, whose published
# weights need data.num_classes = 1000.
ADM = {
    "model": {
        "name": "adm",
        "nf": 192,
        "ch_mult": (1, 2, 3, 4),
        "num_res_blocks": 3,
        "attn_resolutions": (32, 16, 8),
    }
}

# The U-Net of EDM2 (Karras et al. 2024, arXiv 2312.02696), config G, as for ImageNet at 64 x 64.
EDM2 = {
    "model": {
        "name": "edm2",
        "ch_mult": (1, 2, 3, 4),
        "num_res_blocks": 3,
        "attn_resolutions": (16, 8),
        "dropout": 0.0,
    }
}

# DiT-S/2 (Peebles and Xie, ICCV 2023).
DIT = {"model": {"name": "dit", "nf": 384, "patch": 2, "depth": 12, "heads": 6}}

# After NCSNPP or DDPMPP: its "deep" form, and how long the same paper trains it.
DEEP = {"training": {"n_iters": 950001}, "model": {"num_res_blocks": 8}}

# The network of DDPM (Ho et al., NeurIPS 2020), and how it trains it for 256 x 256.
DDPM = {"model": {"name": "ddpm", "num_res_blocks": 2}}
DDPM_LARGE = {
    "optim": {"lr": 2e-5},
    "model": {**DDPM["model"], "ch_mult": (1, 1, 2, 2, 4, 4), "num_scales": 1000},
}

# The RefineNets of NCSN (Song and Ermon, NeurIPS 2019) and NCSNv2 (NeurIPS 2020).
NCSN = {"model": {"name": "ncsn", "nonlinearity": "elu"}}
NCSNV2_64 = {"model": {"name": "ncsnv2_64", "nonlinearity": "elu", "scale_by_sigma": True}}
NCSNV2_128 = {"model": {"name": "ncsnv2_128", "nonlinearity": "elu", "scale_by_sigma": True}}
