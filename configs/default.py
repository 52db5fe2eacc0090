"""What every experiment shares. The defaults of each data set start from here."""

import ml_collections


def get_default_config() -> ml_collections.ConfigDict:
    """Returns a new config without data set, method and network, which the experiment adds."""
    config = ml_collections.ConfigDict()
    config.seed = 42
    config.device = "auto"  # "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"

    config.data = data = ml_collections.ConfigDict()
    data.data_dir = ""  # where the data lies; "" for the default folder of the data set
    data.path = ""  # of data.dataset="folder": a folder or .zip of images, an .npy or .npz
    data.num_channels = 3
    data.resident_bytes = 2**31  # data of at most this size, decoded, stay in memory
    data.num_workers = -1  # processes that decode larger data; -1: as many as processors, up to 8
    data.random_flip = True
    data.uniform_dequantization = False

    config.training = training = ml_collections.ConfigDict()
    training.batch_size = 128
    training.n_iters = 1300001
    training.snapshot_freq = 50000  # steps between numbered checkpoints
    training.snapshot_freq_for_preemption = 10000  # steps between overwritten ones, for resuming
    training.keep_checkpoints = 0  # newest numbered checkpoints that are kept; 0: all
    training.snapshot_sampling = True  # draw samples with every numbered checkpoint
    training.log_freq = 50
    training.eval_freq = 100  # steps between losses on the test split
    training.max_bad_steps = 20  # batches in a row without a finite gradient that end the run
    training.accumulate = 1  # parts of a step's images that go through the network in turn
    training.precision = "fp32"  # or "tf32", "bf16" (autocast): faster on devices that have it
    training.compile = False  # torch.compile the network of training; needs a compiler, and minutes
    training.channels_last = False  # memory format of the network, for tensor cores

    config.optim = optim = ml_collections.ConfigDict()
    optim.optimizer = "Adam"
    optim.lr = 2e-4
    optim.beta1 = 0.9
    optim.eps = 1e-8
    optim.weight_decay = 0.0
    optim.warmup = 5000  # steps over which the learning rate rises linearly from zero
    optim.cooldown = 0  # steps at the end over which it falls linearly to zero
    optim.grad_clip = 1.0  # largest global norm of the gradient; negative: no clipping

    config.model = model = ml_collections.ConfigDict()
    model.nf = 128  # channels at the highest resolution
    model.dropout = 0.1
    model.embedding_type = "fourier"  # how NCSN++ embeds its condition: "fourier", "positional"
    model.scale_by_sigma = False  # divide the output by the noise level
    model.num_scales = 1000  # noise levels, or time steps of an SDE's discretisation
    model.sigma_min = 0.01  # VE SDE: smallest and largest noise level
    model.sigma_max = 50.0
    model.checkpoint_activations = False  # less memory, a third more time; for 256 px and more
    model.beta_min = 0.1  # VP and sub-VP SDE
    model.beta_max = 20.0

    config.sampling = sampling = ml_collections.ConfigDict()
    sampling.ode_solver = "rk45"  # of sampling.method="ode": "rk45" (adaptive); or, with N steps,
    # "heun", "multistep", "forward_euler", "improved_euler"
    sampling.N = 100  # their steps; "pc" takes model.num_scales
    sampling.rho = 7.0  # "heun" and "multistep": the larger, the more steps are close to the data
    sampling.rtol = 1e-4  # error of a step of "rk45", in sampling and likelihood: rtol * |x| + atol
    sampling.atol = 1e-4
    sampling.noise_removal = True  # end with a step of denoising
    sampling.probability_flow = False  # the predictor follows the ODE in place of the SDE
    sampling.n_steps_each = 1  # corrector steps per noise level
    sampling.snr = 0.16  # signal-to-noise ratio of the corrector
    sampling.compile = False  # torch.compile the network that samples

    config.eval = evaluate = ml_collections.ConfigDict()
    evaluate.begin_ckpt = 9  # checkpoints to evaluate, counted in training.snapshot_freq steps
    evaluate.end_ckpt = 26
    evaluate.batch_size = 1024
    evaluate.enable_loss = True
    evaluate.enable_bpd = False
    evaluate.enable_sampling = False
    evaluate.num_samples = 50000
    evaluate.save_images = False  # without sampling: draw the first samples only
    evaluate.enable_interpolate = False  # draw rows of samples between pairs of prior samples
    evaluate.enable_rescale = False  # draw rows of samples along directions of the prior
    evaluate.rescale_norms = ()  # from and to which norm; () for the method's own range
    evaluate.features = "inception"  # what samples are compared by: "inception" (tensorflow-gan's),
    # "torchscript" (a file, no TensorFlow), "pixels"
    evaluate.inception_path = ""  # their network: a SavedModel folder ("" fetches it); the file
    evaluate.stats_dir = "assets/stats"  # data-set statistics: published ones, and those made here
    evaluate.bpd_num_repeats = 5  # passes over the test split, each with new noise
    evaluate.divergence = "rademacher"  # or "gaussian": one probe; "exact": C * H * W of them
    evaluate.dataset = "test"  # the split that loss and likelihood are computed on
    evaluate.bpd_dataset = evaluate.get_ref("dataset")  # its published name: one value, two keys

    return config
