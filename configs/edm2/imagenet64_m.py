"""EDM2-M on ImageNet at 64 x 64 with class labels, a folder or zip at data.path.

It follows the rule of XS and S. Its names and shapes have not been compared with the published
weights.
"""

from configs.parts import EDM, EDM2, EDM2_TRAINING, ConfigDict, experiment


def get_config() -> ConfigDict:
    config = experiment(EDM, EDM2, EDM2_TRAINING)
    config.model.nf, config.optim.lr = 256, 0.009
    config.model.dropout = 0.1
    config.training.n_iters = 1_048_576
    config.eval.begin_ckpt = config.eval.end_ckpt = 32
    return config
