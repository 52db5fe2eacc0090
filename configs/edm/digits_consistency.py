"""Fine-tune the network of digits_ddpmpp.py for one or two evaluations: minutes on a CPU.

--config.training.init_from=runs/digits
"""

from configs.parts import DDPMPP, EDM, ConfigDict, consistency, digits, experiment, share_of_steps


def get_config() -> ConfigDict:
    config = experiment(EDM, DDPMPP, digits, consistency)
    config.training.n_iters = 3000
    config.optim.update(optimizer="Muon", lr=2e-3)
    share_of_steps(config, snapshots=12, cooldown=95)
    return config
