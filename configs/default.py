"""Every key of a config, with the value that holds where no experiment states another.

The config is locked: the defaults of each data set and the experiments only set keys that stand
here, so that a misspelt one is an error.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict, config_dict


def get_default_config() -> ConfigDict:
    """Returns a new, locked config; the experiment sets data set, method and network."""
    config = ConfigDict()
    config.seed = 42  # of weights, noise and the order of the data; >= 0
    config.device = "auto"  # "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"

    config.data = data = ConfigDict()
    data.dataset = ""  # "CIFAR10", "CELEBA", "LSUN", "CelebAHQ", "FFHQ", "digits", "folder"
    data.category = ""  # of "LSUN": "bedroom", "church_outdoor"
    data.tfrecords_path = ""  # of "CelebAHQ" and "FFHQ": their TFRecord file
    data.path = ""  # of "folder": a folder or .zip of images, an .npy or .npz
    data.data_dir = ""  # where the other data lie; "" for the default folder of the data set
    data.image_size = 32  # height and width, >= 1; larger images are resized
    data.num_channels = 3  # 1 or 3; 0: as the data have
    data.num_classes = 0  # class labels the network is given, numbered from 0; 0: none
    data.centered = True  # the network sees [-1, 1], else [0, 1]
    data.random_flip = True  # half of the training images are mirrored
    data.uniform_dequantization = False  # noise of one grey level is added
    data.resident_bytes = 2**31  # data of at most this size, decoded, stay in memory
    data.num_workers = -1  # processes that decode larger data; -1: as many as processors, up to 8

    config.training = training = ConfigDict()
    training.sde = ""  # the method: "poisson", "pfgmpp", "edm", "vesde", "vpsde", "subvpsde"
    training.batch_size = 128  # images of a step, >= 1; they are the reference batch
    training.small_batch_size = 0  # examples of a step, out of the batch; 0: all of the batch
    training.n_iters = 1300001  # steps, >= 1
    training.snapshot_freq = 50000  # steps between numbered checkpoints
    training.snapshot_freq_for_preemption = 10000  # steps between overwritten ones, for resuming
    training.keep_checkpoints = 0  # newest numbered checkpoints that are kept; 0: all
    training.snapshot_sampling = True  # draw samples with every numbered checkpoint
    training.log_freq = 50  # steps between losses on the training data
    training.eval_freq = 100  # steps between losses on the test split
    training.max_bad_steps = 20  # batches in a row without a finite gradient that end the run
    training.accumulate = 1  # micro-batches that a step's examples are split into
    training.precision = "fp32"  # or "tf32", "bf16" (autocast): faster on devices that have it
    training.compile = False  # torch.compile the network of training; needs a compiler, and minutes
    training.channels_last = False  # memory format of the network, for tensor cores
    training.reduce_mean = False  # mean over the entries of an image in the loss, not half the sum
    training.continuous = True  # SDEs: noise levels are continuous; False: SMLD and DDPM
    training.likelihood_weighting = False  # SDEs: weigh the loss by g(t)^2
    training.target = "image"  # PFGM++ and EDM: or "posterior_mean", over the reference batch
    training.gamma = 5.0  # Poisson: added to the field's norm before it divides
    training.tau = 0.03  # Poisson: perturbed points lie about sigma_end * (1 + tau)^m away, m <= M
    training.M = config_dict.placeholder(int)  # Poisson, >= 1; None: measured from the data
    training.restrict_M = True  # Poisson: a smaller M close to the data

    config.optim = optim = ConfigDict()
    optim.optimizer = "Adam"  # the only one
    optim.lr = 2e-4  # learning rate
    optim.beta1 = 0.9  # Adam's decay of the first moment, 0 to 1
    optim.eps = 1e-8  # Adam's
    optim.weight_decay = 0.0  # added to the gradient as a multiple of the weights
    optim.amsgrad = False  # Adam's variant of this name
    optim.warmup = 5000  # steps over which the learning rate rises linearly from zero
    optim.cooldown = 0  # steps at the end over which it falls linearly to zero
    optim.grad_clip = 1.0  # largest global norm of the gradient; negative: no clipping

    config.model = model = ConfigDict()
    model.name = ""  # "ncsnpp", "ddpm", "edm_unet", "adm", "ncsn", "ncsnv2_64", "ncsnv2_128",
    # "ncsnv2_256"
    model.ema_rate = 0.9999  # decay of the EMA weights per step, 0 to 1
    model.ema_half_life = 0.0  # in images, with EDM's ramp-up, instead of ema_rate; 0: ema_rate
    model.checkpoint_activations = False  # less memory, a third more time; for 256 px and more
    model.nf = 128  # channels at the highest resolution
    model.nonlinearity = "swish"  # or "elu", "relu", "lrelu"
    model.scale_by_sigma = False  # VE SDE: divide the output by the noise level
    model.num_scales = 1000  # noise levels, or time steps of an SDE's discretisation; >= 2
    # Of "ncsnpp", "ddpm", "edm_unet" and "adm":
    model.ch_mult = (1, 2, 2, 2)  # channels of each level, in units of nf; a level halves the image
    model.num_res_blocks = 4  # per level
    model.attn_resolutions = (16,)  # attention where the image is this wide
    model.resamp_with_conv = True  # a convolution before or after resampling
    model.conditional = True  # the network sees its noise level or time
    model.dropout = 0.1  # 0 to 1
    model.augment_dim = 0  # entries of the augmentation labels the network is given; 0: none
    # Of "ncsnpp" and "edm_unet":
    model.embedding_type = "fourier"  # of the noise level or time: "fourier", "positional"
    model.fourier_scale = 16.0  # standard deviation of the "fourier" embedding's frequencies
    model.resblock_type = "biggan"  # or "ddpm"
    model.fir = True  # resample with the filter fir_kernel
    model.fir_kernel = (1, 3, 3, 1)
    model.skip_rescale = True  # sums of two branches are divided by sqrt(2)
    model.progressive = "none"  # images along the way up: "none", "output_skip", "residual"
    model.progressive_input = "none"  # and down: "none", "input_skip", "residual"
    model.progressive_combine = "sum"  # how they are joined to the features: "sum", "cat"
    model.init_scale = 0.0  # of the weights that end a branch; 0 stands for 1e-10
    # Of the methods:
    model.sigma_min = 0.01  # VE SDE: smallest and largest noise level, 0 < sigma_min < sigma_max
    model.sigma_max = 50.0
    model.beta_min = 0.1  # VP and sub-VP SDE, 0 < beta_min <= beta_max
    model.beta_max = 20.0
    model.D = 2048.0  # PFGM++: augmenting dimensions, > 0; "inf" is EDM
    model.sigma_data = 0.5  # PFGM++ and EDM: standard deviation of the scaled images, > 0
    model.P_mean = -1.2  # PFGM++ and EDM: mean of ln sigma in training
    model.P_std = 1.2  # its standard deviation, > 0
    model.sigma_end = 0.01  # Poisson: perturbation of points next to the data

    config.sampling = sampling = ConfigDict()
    sampling.method = "ode"  # or, for SDEs, "pc" (predictor and corrector)
    sampling.ode_solver = "rk45"  # of "ode": "rk45" (adaptive); or, with N steps,
    # "heun", "multistep", "forward_euler", "improved_euler"
    sampling.N = 100  # their steps, >= 1; "pc" takes model.num_scales
    sampling.schedule = "auto"  # where they lie: "uniform" (in the method's time), "polynomial"
    # (in the noise level, with rho); "auto": the one that belongs to the solver
    sampling.rho = 7.0  # of "polynomial", > 0: the larger, the more steps are close to the data
    sampling.rtol = 1e-4  # error of a step of "rk45", in sampling and likelihood: rtol * |x| + atol
    sampling.atol = 1e-4
    sampling.noise_removal = True  # end with a step of denoising
    sampling.predictor = "euler_maruyama"  # "pc": or "reverse_diffusion", "ancestral_sampling",
    # "none"
    sampling.corrector = "none"  # "pc": or "langevin", "ald"
    sampling.probability_flow = False  # the predictor follows the ODE instead of the SDE
    sampling.n_steps_each = 1  # corrector steps per noise level
    sampling.snr = 0.16  # signal-to-noise ratio of the corrector
    sampling.sigma_min = 0.002  # PFGM++ and EDM: last noise level before 0, and the first
    sampling.sigma_max = 80.0
    sampling.z_max = config_dict.placeholder(float)  # Poisson: the prior's plane, where the ODE
    # starts; None: measured from the data
    sampling.z_min = 1e-3  # Poisson: where it ends, 0 < z_min < z_max
    sampling.z_exp = 5.0  # Poisson: below it, z itself gives the field's z entry, not the network
    sampling.upper_norm = config_dict.placeholder(float)  # Poisson: the prior sample's norm is
    # clipped to it; None: measured from the data
    sampling.compile = False  # torch.compile the network that samples

    config.eval = evaluate = ConfigDict()
    evaluate.begin_ckpt = 1  # checkpoints to evaluate, counted in training.snapshot_freq steps
    evaluate.end_ckpt = 26
    evaluate.batch_size = 1024  # images at once
    evaluate.dataset = "test"  # the split that loss and likelihood are computed on; or "train"
    evaluate.bpd_dataset = evaluate.get_ref("dataset")  # its published name: one value, two keys
    evaluate.enable_loss = True
    evaluate.enable_bpd = False  # bits/dim
    evaluate.bpd_num_repeats = 5  # passes over the test split, each with new noise
    evaluate.divergence = "rademacher"  # or "gaussian": one probe; "exact": C * H * W of them
    evaluate.enable_sampling = False  # samples, and how far they are from the data
    evaluate.num_samples = 50000
    evaluate.features = "inception"  # what samples are compared by: "inception" (tensorflow-gan's),
    # "torchscript" (a file, no TensorFlow), "pixels"
    evaluate.inception_path = ""  # their network: a SavedModel folder ("" fetches it); the file
    evaluate.stats_dir = "assets/stats"  # data-set statistics: published ones, and those made here
    evaluate.save_images = False  # without sampling: draw the first samples only
    evaluate.enable_interpolate = False  # draw rows of samples between pairs of prior samples
    evaluate.enable_rescale = False  # draw rows of samples along directions of the prior
    evaluate.rescale_norms = ()  # from and to which norm; () for the method's own range

    return config.lock()


def updated(config: ConfigDict, parts: Iterable[dict]) -> ConfigDict:
    """`config` itself, updated with each of the `parts` (a method, a network); later ones win."""
    for part in parts:
        config.update(part)
    return config


def share_of_steps(config: ConfigDict, snapshots: int) -> None:
    """Makes what counts steps a share of `training.n_iters`, also where that is overridden.

    The run has at most `snapshots` checkpoints at equal distances; the last of these is evaluated.
    """
    n_iters = config.training.get_ref("n_iters")
    config.training.snapshot_freq = (n_iters + (snapshots - 1)) // snapshots
    freq = config.training.get_ref("snapshot_freq")
    for key in ("begin_ckpt", "end_ckpt"):  # an expression each, so that either can be overridden
        config.eval[key] = (n_iters + freq - 1) // freq
    config.optim.warmup = n_iters // 40
    config.optim.cooldown = n_iters * 3 // 10
