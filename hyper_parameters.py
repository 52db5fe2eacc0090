"""M, z_max and upper_norm of a Poisson flow, from the norm and dimension of its data.

python3 hyper_parameters.py --config configs/poisson/digits_ddpmpp.py [--config.a.b=VALUE ...]
python3 hyper_parameters.py --data_norm 27.9 --data_dim 3072
"""

import math

from absl import app, flags

from configs import command_line
from reports import streams

FLAGS = flags.FLAGS

flags.DEFINE_float("data_norm", None, "Mean Euclidean norm of the scaled images, if known.")
flags.DEFINE_integer("data_dim", None, "D = C * H * W, if known.")
flags.DEFINE_float("sigma", None, "Instead of model.sigma_end (0.01 without --config).")
flags.DEFINE_float("tau", None, "Instead of training.tau (0.03 without --config).")


def main(argv: list[str]) -> None:
    numbers = {name: FLAGS[name].value for name in ("data_norm", "data_dim", "sigma", "tau")}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    config, of_config = FLAGS.config, {}
    if config is None and not numbers.keys() >= {"data_norm", "data_dim"}:
        command_line.fail("give --config, or --data_norm and --data_dim")
    with command_line.one_line_errors():
        if config is not None:
            training, sampling = config.training, config.sampling
            of_config = {
                "training.M": training.M,
                "sampling.z_max": sampling.z_max,
                "sampling.upper_norm": sampling.upper_norm,
            }
            numbers = _measured(config) | numbers
        from methods.poisson import poisson_range  # torch: not before the flags are parsed

        result = poisson_range(**numbers)
    print(f"mean norm {numbers['data_norm']:.4g} in {numbers['data_dim']} dimensions")
    keys = ("training.M", "sampling.z_max", "sampling.upper_norm")
    for key, value in zip(keys, result, strict=True):
        configured = of_config.get(key)
        differs = configured is not None and not math.isclose(configured, value, rel_tol=0.01)
        print(f"{key:<20} {value:>8.4g}{f'   the config has {configured:g}' if differs else ''}")


def _measured(config) -> dict[str, float]:
    """The arguments of `poisson_range`, measured as training measures them at its first start."""
    from completion import MEASURED, complete, norm_of
    from sources.codec import from_config as get_codec

    config.update_from_flattened_dict(dict.fromkeys(MEASURED, 1))  # so that they are not open
    config, data, _ = complete(config)
    codec = get_codec(config)
    return {
        "data_norm": norm_of(data, codec),
        "data_dim": math.prod(codec.shape),
        "sigma": config.model.sigma_end,
        "tau": config.training.tau,
    }


if __name__ == "__main__":
    streams.make_lenient()
    app.run(main, flags_parser=command_line.parse)
