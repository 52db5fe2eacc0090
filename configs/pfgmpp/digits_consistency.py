"""Fine-tune the network of `make demo` for one or two evaluations: minutes on a CPU.

--config.training.init_from=runs/demo
"""

from configs.parts import DDPMPP, PFGMPP, ConfigDict, consistency, digits, experiment, quick


def get_config() -> ConfigDict:
    config = experiment(PFGMPP, DDPMPP, digits, quick, consistency)
    config.training.n_iters = 3000
    config.optim.update(optimizer="Muon", lr=2e-3)
    config.model.update(ch_mult=(1, 3), ema_rate=0.995)
    return config
