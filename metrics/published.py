"""Statistics files of other programs, recognised by names and shapes of their arrays."""

from collections.abc import Mapping

from numpy.typing import NDArray

MOMENTS = ("mu", "sigma")  # names in files of EDM, ADM, pytorch-fid, clean-fid, and ours
FEATURES = "pool_3"  # in ours, and in those of score_sde


def with_our_names(arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """`arrays` with the mean under `mu`, the covariance under `sigma`, features under `pool_3`.

    Arrays of other names count where there is one choice only: a vector (K,) and a matrix (K, K)
    are moments, a matrix (n, K) is features (clean-fid's `feats`). ADM's `mu_s` and `sigma_s`, of
    another layer, are ignored beside `mu` and `sigma`.
    """
    renamed = dict(arrays)
    floats = {name: a for name, a in arrays.items() if a.dtype.kind == "f" and name != FEATURES}
    if not {*MOMENTS} & arrays.keys():
        pairs = [
            (vector, matrix)
            for vector, of_mean in floats.items()
            for matrix, of_covariance in floats.items()
            if of_mean.ndim == 1 and of_covariance.shape == 2 * of_mean.shape
        ]
        if len(pairs) == 1:
            renamed |= dict(zip(MOMENTS, map(renamed.pop, pairs[0]), strict=True))
    matrices = [name for name in floats.keys() & renamed.keys() if _may_be_features(name, renamed)]
    if FEATURES not in arrays and len(matrices) == 1:
        renamed[FEATURES] = renamed.pop(matrices[0])
    return renamed


def _may_be_features(name: str, arrays: Mapping[str, NDArray]) -> bool:
    shape, mean = arrays[name].shape, arrays.get("mu")
    if len(shape) != 2 or name in MOMENTS:
        return False
    return mean is None or mean.ndim == 1 and shape[1] == len(mean)
