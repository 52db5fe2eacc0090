"""M, z_max and upper_norm of a Poisson flow, from the norm and dimension of its data.

python3 hyper_parameters.py --config configs/poisson/digits_ddpmpp.py
python3 hyper_parameters.py --data_norm 27.9 --data_dim 3072
"""

import argparse
import math
import runpy
from typing import NamedTuple


class PoissonRange(NamedTuple):
    """How far perturbations reach, and the prior plane that follows."""

    M: int
    z_max: float
    upper_norm: float


def poisson_range(
    data_norm: float, data_dim: int, sigma: float = 0.01, tau: float = 0.03
) -> PoissonRange:
    """The range of `methods.Poisson` for data of a given size.

    Args:
        data_norm: mean Euclidean norm of the scaled images.
        data_dim: D = C * H * W.
        sigma, tau: `model.sigma_end` and `training.tau`.

    Raises:
        ValueError: a number is not positive, or the data are no larger than their perturbation.

    Source: Xu et al. 2022 (arXiv 2209.11178), appendix B.1.1.
    """
    if not min(data_norm, data_dim, sigma, tau) > 0:
        raise ValueError("data_norm, data_dim, sigma and tau must all be positive")
    ratio = data_norm**2 / (2 * math.sqrt(data_dim) * sigma**2)
    if ratio <= 1:
        raise ValueError(f"data of norm {data_norm:g} are lost in perturbations of sigma {sigma:g}")
    m = int(0.75 * math.log(ratio) / math.log(1 + tau)) + 1
    reach = sigma * (1 + tau) ** m
    return PoissonRange(m, math.sqrt(2 / math.pi) * reach, math.sqrt(data_dim) * reach)


def data_norm(data, scaler, batch_size: int = 1000) -> float:
    """Mean Euclidean norm of the scaled images of a data set (see datasets.py)."""
    import datasets

    total = 0.0
    for batch in datasets.in_order(data, batch_size):
        images = scaler(batch.images / 255)
        total += images.flatten(1).norm(dim=1).sum().item()
    return total / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="experiment whose data are measured, its values compared")
    parser.add_argument("--data_norm", type=float, help="mean norm of scaled images, if known")
    parser.add_argument("--data_dim", type=int, help="D = C * H * W, if known")
    parser.add_argument("--sigma", type=float, help="model.sigma_end (the config's, else 0.01)")
    parser.add_argument("--tau", type=float, help="training.tau (the config's, else 0.03)")
    options = parser.parse_args()
    known = {name: value for name, value in vars(options).items() if value is not None}
    path = known.pop("config", None)
    if path is None and not known.keys() >= {"data_norm", "data_dim"}:
        parser.error("give --config, or --data_norm and --data_dim")

    configured = {}
    try:
        if path is not None:
            config = runpy.run_path(path)["get_config"]()
            known = _of_config(config) | known
            configured = {
                "M": config.training.get("M"),
                "z_max": config.sampling.get("z_max"),
                "upper_norm": config.sampling.get("upper_norm"),
            }
        result = poisson_range(**known)
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))
    print(f"mean norm {known['data_norm']:.4g} in {known['data_dim']} dimensions")
    for name, value in result._asdict().items():
        given = configured.get(name)
        differs = given is not None and not math.isclose(given, value, rel_tol=0.01)
        key = f"training.{name}" if name == "M" else f"sampling.{name}"
        print(f"{key:<20} {value:>8.4g}{f'   the config has {given:g}' if differs else ''}")


def _of_config(config) -> dict:
    import datasets

    data = datasets.get_dataset(config, "train")
    return {
        "data_norm": data_norm(data, datasets.get_data_scaler(config)),
        "data_dim": data[:1].numel(),
        "sigma": config.model.get("sigma_end", 0.01),
        "tau": config.training.get("tau", 0.03),
    }


if __name__ == "__main__":
    main()
