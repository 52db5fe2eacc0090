"""A new metric in one file: how far the mean of the samples lies from that of the data."""

import ml_collections
import numpy as np

from configs.vp import digits_ddpmpp
from metrics import table


def distance_of_means(c: table.Comparison) -> float:
    return float(np.linalg.norm(c.features.mean(0) - c.reference.gaussian.mean))


table.METRICS["means"] = table.Metric(
    "Distance of means", -1, "of samples and data, in feature space", distance_of_means
)


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.sampling.ode_solver = "forward_euler"
    return config
