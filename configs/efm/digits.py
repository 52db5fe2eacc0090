"""Field matching with a thin DDPM++, from handwritten 3 to 2, 8 x 8: minutes on a CPU core."""

from configs.parts import DDPMPP, EFM, ConfigDict, demo, digits, experiment, quick


def get_config() -> ConfigDict:
    config = experiment(DDPMPP, digits, quick, demo, EFM)
    config.data.update(classes="2", prior_dataset="digits", prior_classes="3")
    config.efm.update(L=4.0, z_min=0.02, reach=300.0)
    config.training.small_batch_size = 128
    return config
