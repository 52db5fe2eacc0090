"""PFGM++ with a thin DDPM++ on your own images, 16 x 16: minutes on two CPU cores.

--config.data.path=photos/
"""

from configs.parts import DDPMPP, PFGMPP, ConfigDict, experiment, images, quick


def get_config() -> ConfigDict:
    config = experiment(DDPMPP, images, PFGMPP, quick)
    config.data.image_size = 16
    config.training.update(n_iters=1700, precision="auto")
    config.optim.optimizer = "Muon"
    config.model.update(D=128, ch_mult=(1, 4, 4), attn_resolutions=(8, 4))
    return config
