"""PFGM++ with a thin DDPM++ on pairs: the image, given its measurement; minutes for 32 x 32.

    --config.data.path=clean/ --config.data.condition_path=noisy/

D = 64 did best in PPFM (Hein et al. 2023, arXiv 2312.09754). Pairs may be folders of images or
arrays in units of their own, all of one size, which may be any; see docs/pairs.md. Heun's 18 steps
would make the draws differ too much (docs/benchmarks.md, "Pairs").
"""

from configs.parts import DDPMPP, PFGMPP, ConfigDict, experiment, images, share_of_steps


def get_config() -> ConfigDict:
    config = experiment(DDPMPP, images, PFGMPP)
    config.data.image_size = 0
    config.model.update(D=64.0, nf=16, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,))
    config.model.dropout = 0.0
    config.training.update(n_iters=2000, batch_size=32, precision="auto")
    config.optim.update(optimizer="Muon", lr=4e-3)
    config.sampling.update(ode_solver="ipndm", N=18)
    config.eval.update(enable_pairs=True, enable_sampling=False)
    share_of_steps(config, snapshots=10, cooldown=95)
    return config
