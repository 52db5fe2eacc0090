"""NCSN with technique 5 of NCSNv2 on CelebA, 64 x 64."""

from configs.parts import CELEBA, NCSN, SMLD, SMLD_2019, ConfigDict, experiment


def get_config() -> ConfigDict:
    return experiment(CELEBA, SMLD, NCSN, SMLD_2019)
