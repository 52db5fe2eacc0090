"""EDM2's network, objective and learning rate on handwritten digits, 8 x 8: minutes on a CPU."""

from configs.parts import EDM, EDM2, EDM2_TRAINING, ConfigDict, digits, experiment


def get_config() -> ConfigDict:
    config = experiment(EDM, EDM2, EDM2_TRAINING, digits)
    config.data.num_classes = 0
    config.training.update(batch_size=96, reduce_mean=True)
    config.optim.update(lr=0.02, decay_from=config.training.get_ref("n_iters") // 4)
    config.model.update(nf=16, head_width=16, P_std=1.2)
    return config
