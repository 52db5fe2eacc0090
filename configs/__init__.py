"""Experiments: one file each, named `{method}/{data}_{network}.py`, run as `--config FILE`.

`get_config()` of an experiment starts from the default of its data (`default_cifar10.py`, ...) with
the parts that it names, a method (`methods.py`) and a network (`networks.py`), and states what else
differs:

    config = get_default_config(POISSON, DDPMPP)
    config.model.num_res_blocks = 8
    return config

Later parts and later lines win. `default.py` has every key and explains it; each of them can be
set on the command line too, as in `--config.training.batch_size=64`. Nothing here imports more than
`ml_collections` and absl, so that a typing error in a flag is reported at once.
"""
