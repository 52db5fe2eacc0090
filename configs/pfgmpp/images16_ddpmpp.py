"""PFGM++ with a thin DDPM++ on your own images, 16 x 16: minutes on two CPU cores.

--config.data.path=photos/
"""

from configs.parts import DDPMPP, PFGMPP, ConfigDict, experiment, images, quick


def get_config() -> ConfigDict:
    config = experiment(DDPMPP, images, PFGMPP, quick)
    config.data.image_size = 16
    config.training.n_iters = 1200
    config.model.update(ch_mult=(1, 3, 3), attn_resolutions=(4,))
    return config
