"""M, z_max and upper_norm of a Poisson flow, from the norm and dimension of its data.

python3 hyper_parameters.py --config configs/poisson/digits_ddpmpp.py [--config.a.b=VALUE ...]
python3 hyper_parameters.py --data_norm 27.9 --data_dim 3072
"""

import math

from absl import app, flags

from configs import command_line

FLAGS = flags.FLAGS

flags.DEFINE_float("data_norm", None, "Mean Euclidean norm of the scaled images, if known.")
flags.DEFINE_integer("data_dim", None, "D = C * H * W, if known.")
flags.DEFINE_float("sigma", None, "Instead of model.sigma_end (0.01 without --config).")
flags.DEFINE_float("tau", None, "Instead of training.tau (0.03 without --config).")


def main(argv: list[str]) -> None:
    names = ("data_norm", "data_dim", "sigma", "tau")
    known = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    config, configured = FLAGS.config, {}
    if config is None and not known.keys() >= {"data_norm", "data_dim"}:
        command_line.fail("give --config, or --data_norm and --data_dim")
    try:
        if config is not None:
            known = _of_config(config) | known
            configured = {
                "M": config.training.M,
                "z_max": config.sampling.z_max,
                "upper_norm": config.sampling.upper_norm,
            }
        from methods.poisson import poisson_range  # torch: not before the flags are parsed

        result = poisson_range(**known)
    except (OSError, ValueError) as error:
        command_line.fail(error)
    print(f"mean norm {known['data_norm']:.4g} in {known['data_dim']} dimensions")
    for name, value in result._asdict().items():
        given = configured.get(name)
        differs = given is not None and not math.isclose(given, value, rel_tol=0.01)
        key = f"training.{name}" if name == "M" else f"sampling.{name}"
        print(f"{key:<20} {value:>8.4g}{f'   the config has {given:g}' if differs else ''}")


def _of_config(config) -> dict:
    from datasets import Data, mean_norm
    from sources.codec import from_config as get_codec

    if config.data.num_channels == 0:
        config.data.num_channels = Data(config.data).measure_channels()
    data = Data(config.data).get("train", labels=False)
    return {
        "data_norm": mean_norm(data, get_codec(config).encode),
        "data_dim": data[:1].numel(),
        "sigma": config.model.sigma_end,
        "tau": config.training.tau,
    }


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
