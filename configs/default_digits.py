"""scikit-learn's handwritten digits, 8 x 8 grey: the experiments that two CPU cores train."""

from ml_collections import ConfigDict

from configs import default

# A part after method and network: what suits small images and little time.
SMALL = {
    "training": {
        "n_iters": 2000,
        "log_freq": 20,
        "eval_freq": 200,
        "snapshot_freq_for_preemption": 200,
    },
    "optim": {"lr": 1e-3},
    "model": {
        "nf": 32,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (4,),
        "dropout": 0.0,
        "ema_rate": 0.995,
    },
    "eval": {
        "batch_size": 500,
        "num_samples": 1000,
        "features": "pixels",
        "enable_loss": True,
        "enable_bpd": True,
        "enable_sampling": True,
    },
}


def get_default_config(*parts: dict) -> ConfigDict:
    """Returns the shared default for the digits, updated with the `parts`; four checkpoints."""
    config = default.get_default_config()
    config.data.dataset = "digits"
    config.data.image_size = 8
    config.data.num_channels = 1
    config.data.random_flip = False
    config.training.M = 261  # this and the next two as hyper_parameters.py measures them
    config.sampling.z_max = 17.9
    config.sampling.upper_norm = 179.0
    config.model.sigma_max = 5.0  # the largest distance of two digits (arXiv 2006.09011)
    config.model.sigma_data = 0.75  # standard deviation of the scaled images' entries
    config.model.P_mean = -0.8  # larger than published by the log of 0.75 / 0.5
    default.share_of_steps(config, snapshots=4)
    return default.updated(config, parts)
