"""Field matching with a small MLP, from eight Gaussians to two moons: a minute on a CPU."""

from configs.parts import EFM, MLP, ConfigDict, experiment, toy


def get_config() -> ConfigDict:
    config = experiment(MLP, toy, EFM)
    config.data.update(dataset="moons", prior_dataset="eight_gaussians")
    config.efm.update(L=3.0, z_min=0.03, reach=30.0)
    config.training.update(batch_size=2048, small_batch_size=512, n_iters=2000)
    return config
