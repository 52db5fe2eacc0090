"""Rectified flow with a thin DDPM++ on handwritten digits, 8 x 8: the recipe of `make demo`."""

from configs.parts import DDPMPP, FLOW, ConfigDict, digits, experiment, quick


def get_config() -> ConfigDict:
    config = experiment(FLOW, DDPMPP, digits, quick)
    config.training.update(n_iters=1500, precision="auto")
    config.optim.optimizer = "Muon"
    config.model.ch_mult = (1, 3)
    config.eval.bpd_num_repeats = 1
    return config
