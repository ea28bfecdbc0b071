"""The Kolmogorov-Smirnov statistic as a picture shows it: the largest gap between two distribution functions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from efface.evaluate.logs import FloatArray


@dataclass(frozen=True)
class Gap:
    """Where two empirical distribution functions F and G differ most.

    Attributes:
        statistic: D = max over x of |F(x) − G(x)|.
        location: the sample value x at which they do.
        heights: F(x) and G(x).
        pvalue: of D under equal distributions; between truth ratios it is Forget Quality.
    """

    statistic: float
    location: float
    heights: tuple[float, float]
    pvalue: float


def ecdf(values: FloatArray, at: FloatArray | float) -> NDArray[np.float64]:
    """F(x) = the share of ``values`` that are at most x."""
    shares: NDArray[np.float64] = np.searchsorted(np.sort(values), at, side="right") / len(values)
    return np.asarray(shares)


def largest_gap(first: FloatArray, second: FloatArray) -> Gap:
    """Return the two-sample statistic with its place; both samples finite and not empty."""
    test = ks_2samp(first, second)
    location = float(test.statistic_location)
    heights = float(ecdf(first, location)), float(ecdf(second, location))
    return Gap(float(test.statistic), location, heights, float(test.pvalue))
