"""Experiments: one file each, named `{method}/{data}_{network}.py`, run as `--config FILE`.

`get_config()` of an experiment names its parts, a data set, a method and a network of `parts.py`,
and states what else differs:

    config = experiment(CIFAR10, POISSON, DDPMPP)
    config.model.num_res_blocks = 8
    return config

Later parts and later lines win. `default.py` gathers the keys from the parts that read them, where
each is explained; every key can also be set on the command line, as in
`--config.training.batch_size=64`. docs/config.md lists them.
"""
