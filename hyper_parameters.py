"""M, z_max and upper_norm of a Poisson flow, from its data's norm and dimension.

python3 hyper_parameters.py --data_norm 27.9 --data_dim 3072
"""

import argparse
import math
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
        data_norm: mean Euclidean norm of the scaled images; > 0.
        data_dim: D = C * H * W.
        sigma, tau: `model.sigma_end` and `training.tau`.

    Source: Xu et al. 2022 (arXiv 2209.11178), appendix B.1.1.
    """
    if not (data_norm > 0 and data_dim > 0 and sigma > 0 and tau > 0):
        raise ValueError("data_norm, data_dim, sigma and tau must all be positive")
    ratio = data_norm**2 / (2 * math.sqrt(data_dim) * sigma**2)
    m = int(0.75 * math.log(ratio) / math.log(1 + tau)) + 1
    reach = sigma * (1 + tau) ** m
    return PoissonRange(m, math.sqrt(2 / math.pi) * reach, math.sqrt(data_dim) * reach)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_norm", type=float, required=True, help="mean norm of scaled images")
    parser.add_argument("--data_dim", type=int, required=True, help="D = C * H * W")
    parser.add_argument("--sigma", type=float, default=0.01, help="model.sigma_end (default 0.01)")
    parser.add_argument("--tau", type=float, default=0.03, help="training.tau (default 0.03)")
    options = parser.parse_args()
    try:
        result = poisson_range(options.data_norm, options.data_dim, options.sigma, options.tau)
    except ValueError as error:
        parser.error(str(error))
    print(f"training.M           {result.M}")
    print(f"sampling.z_max       {result.z_max:.4g}")
    print(f"sampling.upper_norm  {result.upper_norm:.4g}")


if __name__ == "__main__":
    main()
