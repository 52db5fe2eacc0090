"""PFGM with DDPM++ on LSUN bedrooms, 256 x 256."""

from configs.parts import DDPMPP, LSUN, POISSON, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(LSUN, POISSON, DDPMPP)
    config.data.category = "bedroom"
    config.training.batch_size = 32
    config.training.small_batch_size = 32
    config.training.reduce_mean = True
    config.training.M = 356
    config.training.eval_freq = 5000
    config.optim.lr = 2e-5
    config.model.ch_mult = (1, 1, 2, 2, 4, 4)
    config.model.num_res_blocks = 2
    config.sampling.z_max = 100.0
    config.sampling.z_exp = 0.1
    config.sampling.upper_norm = 30000.0
    config.eval.begin_ckpt = 11
    config.eval.end_ckpt = 20
    config.eval.batch_size = 100
    config.eval.enable_sampling = True
    return config
