"""How sure a comparison is: means with intervals, paired differences, correction for the number of arms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, in the units of the values.

    Attributes:
        mean (`float`): Mean over seeds.
        low, high (`float`): Ends of the interval, Student's t with n − 1 degrees of freedom.
    """

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """
    Attributes:
        p_value (`float`): Of the two-sided paired t-test against a mean difference of 0.
    """

    p_value: float


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean and its confidence interval by Student's t.

    Args:
        values (`Sequence[float]` of length n): One value a seed.
        level (`float`, *optional*, defaults to `0.95`): Coverage of the interval.

    Raises:
        `ValueError`: for fewer than two values, one that is not finite, or a level outside (0, 1).
        `ImportError`: when scipy is missing.
    """
    array = _finite(values)
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    mean, error = float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array)))
    half_width = float(_scipy_stats().t.ppf((1 + level) / 2, len(array) - 1)) * error
    return Estimate(mean, mean - half_width, mean + half_width)


def paired_difference(values: Sequence[float], reference: Sequence[float], level: float = 0.95) -> PairedDifference:
    """The mean of `values − reference` over seeds, its interval, and the p of a two-sided paired t-test.

    Args:
        values, reference (`Sequence[float]` of length n): One value a seed, in the same order of seeds.
        level (`float`, *optional*, defaults to `0.95`): Coverage of the interval.

    Raises:
        `ValueError`: when the lengths differ, and as [`mean_and_interval`].
        `ImportError`: when scipy is missing.
    """
    if len(values) != len(reference):
        raise ValueError(
            f"a paired difference needs one value of each arm for every seed, got {len(values)} and {len(reference)}"
        )
    difference = _finite(values) - _finite(reference)
    estimate = mean_and_interval(difference.tolist(), level)
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    if error == 0:  # the same difference at every seed: t is 0/0 or infinite
        p_value = float(estimate.mean == 0)
    else:
        p_value = float(2 * _scipy_stats().t.sf(abs(estimate.mean) / error, len(difference) - 1))
    return PairedDifference(estimate.mean, estimate.low, estimate.high, p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: adjusted p values that bound the chance of a single false finding among all arms.

    The k-th smallest of m values (k = 0, 1, …) is multiplied by m − k, and none is smaller than the one before it
    (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values (`Mapping[str, float]`): From arm to its own p value.

    Returns:
        `dict[str, float]`: From arm to its adjusted p value, in the order given.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"an interval needs the values of at least two seeds, got {array.tolist()}")
    if not np.isfinite(array).all():
        raise ValueError(f"the value of seed number {int(np.argmin(np.isfinite(array)))} is not finite: {values}")
    return array


def _scipy_stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "confidence intervals need scipy, which comes with the extra 'demo': pip install 'know_hf[demo]'"
        ) from error
    return stats
