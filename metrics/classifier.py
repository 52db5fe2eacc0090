"""A classifier of features, to see whether samples show the class that they were drawn for."""

import numpy as np
from numpy.typing import NDArray

from metrics.distances import TooFew


def accuracy(features: NDArray, labels: NDArray, queries: NDArray, expected: NDArray) -> float:
    """Share of `queries` (n, K) to which a classifier gives the class labels `expected` (n,).

    scikit-learn's support vector classifier with a Gaussian kernel, fitted to `features` (m, K) of
    the class `labels` (m,). `TooFew` where these are of one class only, or there are no queries.
    """
    from sklearn.svm import SVC

    if len(np.unique(labels)) < 2 or not len(queries):
        raise TooFew("a classifier needs training images of 2 classes, and images to classify")
    return float(np.mean(SVC(C=10.0).fit(features, labels).predict(queries) == expected))
