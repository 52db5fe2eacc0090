"""The user's own images, small: for one small GPU, or a patient CPU."""

from ml_collections import ConfigDict

from configs import default

# Follows method and network.
SMALL = {
    "training": {
        "batch_size": 128,
        "small_batch_size": 0,
        "n_iters": 50000,
        "snapshot_freq_for_preemption": 1000,
        "eval_freq": 500,
    },
    "optim": {"lr": 5e-4},
    "model": {"nf": 64, "ch_mult": (1, 2, 2), "num_res_blocks": 2},
    "sampling": {"method": "ode", "ode_solver": "multistep", "N": 20},
    "eval": {
        "batch_size": 100,
        "num_samples": 1000,
        "features": "pixels",
        "enable_loss": True,
        "enable_sampling": True,
    },
}


def get_default_config(image_size: int, *parts: dict) -> ConfigDict:
    """Returns the shared default for images at `data.path`, updated with the `parts` and SMALL.

    There is a checkpoint at each tenth, and the EMA weights average over about as many steps.
    """
    config = default.get_default_config()
    config.data.dataset = "folder"
    config.data.image_size = image_size
    config.data.num_channels = 0
    config.data.random_flip = False
    default.share_of_steps(config, snapshots=10)
    default.updated(config, (*parts, SMALL))
    n_iters = config.training.get_ref("n_iters").to_float()
    config.model.ema_rate = n_iters / (n_iters + 10.0)
    return config
