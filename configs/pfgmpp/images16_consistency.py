"""Fine-tune the network of images16_ddpmpp.py for one or two evaluations.

--config.data.path=photos/ --config.training.init_from=runs/mine
"""

from configs.parts import DDPMPP, PFGMPP, ConfigDict, consistency, experiment, images, quick


def get_config() -> ConfigDict:
    config = experiment(DDPMPP, images, PFGMPP, quick, consistency)
    config.data.image_size = 16
    config.training.n_iters = 3000
    config.consistency.c = 0.06  # the reference batch need not be all of the data
    config.optim.update(optimizer="Muon", lr=2e-3)
    config.training.precision = "auto"
    config.model.update(D=128, ch_mult=(1, 4, 4), attn_resolutions=(8, 4), ema_rate=0.995)
    return config
