"""Means with intervals, paired t-tests and Holm's correction.

The unit of the statistics is the trajectory. Several downstream draws of one trajectory share its weights and are not
independent: they are averaged first, and the t-test over these means has one degree of freedom less than there are
trajectories. With equally many draws per trajectory this is exactly the test of a mixed model with
a random effect of the trajectory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np

from ..extras import missing

_POWER = 0.8
_NO_SPREAD = 1e-12  # relative to the largest difference: below it the differences are equal up to rounding


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its confidence interval, in the units of the values."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """A mean paired difference with its interval and test.

    Attributes:
        p_value (`float`):
            p of the two-sided paired t-test against a mean difference of 0; 1 if all differences are equal, since
            their spread is then unknown.
        effect_size (`float`, *optional*):
            Cohen's d_z: mean over standard deviation of the differences; `None` if all differences are equal.
        minimum_detectable (`float`, *optional*):
            Smallest true difference that the test detects with a power of 80%, given the spread of the differences
            ([`minimum_detectable_effect`]); `None` if all differences are equal.
    """

    p_value: float
    effect_size: float | None = None
    minimum_detectable: float | None = None


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Compute the mean of one value per seed and its confidence interval by Student's t.

    Raises:
        `ValueError`: For fewer than two values, a value that is not finite, or a level outside (0, 1).
        `ImportError`: If scipy is missing.
    """
    array = _finite(values)
    if not 0 < level < 1:
        raise ValueError(f"level must be strictly between 0 and 1, got {level}")
    stats = scipy_stats()
    mean, half_width = float(array.mean()), float(stats.t.ppf((1 + level) / 2, len(array) - 1) * stats.sem(array))
    return Estimate(mean, mean - half_width, mean + half_width)


def paired_difference(
    values: Sequence[float], reference: Sequence[float], level: float = 0.95, num_tests: int = 1
) -> PairedDifference:
    """Compute the mean of `values − reference` over seeds, its interval and the p of a two-sided paired t-test.

    Args:
        values, reference (`Sequence[float]` of length n):
            One value per seed, in the same order of seeds.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        num_tests (`int`, *optional*, defaults to `1`):
            Number of differences tested together. The minimum detectable difference is that at the level
            `(1 - level) / num_tests`, the strictest one of Holm's correction.

    Raises:
        `ValueError`: If the lengths differ, and as [`mean_and_interval`].
        `ImportError`: If scipy is missing.
    """
    if len(values) != len(reference):
        raise ValueError(f"a paired test needs one value per seed and arm, got {len(values)} and {len(reference)}")
    difference = _finite(values) - _finite(reference)
    estimate = mean_and_interval(difference.tolist(), level)
    deviation = float(difference.std(ddof=1))
    if deviation <= _NO_SPREAD * float(np.abs(difference).max()):  # t would be 0/0 or infinite
        return PairedDifference(**vars(estimate), p_value=1.0)
    p_value = float(scipy_stats().ttest_1samp(difference, 0).pvalue)
    detectable = deviation * minimum_detectable_effect(len(difference), (1 - level) / num_tests)
    return PairedDifference(estimate.mean, estimate.low, estimate.high, p_value, estimate.mean / deviation, detectable)


@cache
def minimum_detectable_effect(n: int, alpha: float = 0.05) -> float:
    """Compute the smallest effect, in standard deviations of n differences, that a paired t-test detects with a power
    of 80%.

    It is the d at which the noncentral t distribution with `n - 1` degrees of freedom and noncentrality `d √n` has
    probability 0.8 above the limit of the two-sided test (J. Cohen, *Statistical Power Analysis*, 1988).
    """
    stats = scipy_stats()
    from scipy.optimize import brentq

    limit = float(stats.t.ppf(1 - alpha / 2, n - 1))

    def missing_power(noncentrality: float) -> float:
        return float(stats.nct.sf(limit, n - 1, noncentrality)) - _POWER

    upper = limit + 1
    while missing_power(upper) < 0:
        upper *= 2
    return float(brentq(missing_power, 0, upper)) / float(np.sqrt(n))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p values by Holm's step-down method, which bounds the probability of any false positive.

    The k-th smallest of m values (k = 0, 1, …) is multiplied by m − k, and none is smaller than the one before it
    (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    Returns:
        `dict[str, float]`: From arm to its corrected p value, in the given order.
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


@dataclass(frozen=True)
class VarianceComponents:
    """Variances of a value: between trajectories, and within one, between its draws; for `draws` draws of each."""

    between: float
    within: float
    draws: float

    @property
    def share_of_draws(self) -> float | None:
        """Share of the draws in the variance of the mean of one trajectory; `None` without variance."""
        of_draws = self.within / self.draws
        return of_draws / (self.between + of_draws) if self.between + of_draws else None


def variance_components(values: Sequence[Sequence[float]]) -> VarianceComponents | None:
    """Estimate both variances by the method of moments of a one-way random effects model, of one value per draw of
    each trajectory.

    Returns:
        [`VarianceComponents`], `None` without a trajectory of several draws or with a single trajectory. `between` is
        0 where the estimate is negative.
    """
    several = [of_one for of_one in values if len(of_one) > 1]
    if len(values) < 2 or not several:
        return None
    within = float(np.mean([np.var(of_one, ddof=1) for of_one in several]))
    draws = 1 / float(np.mean([1 / len(of_one) for of_one in values]))
    means = [float(np.mean(of_one)) for of_one in values]
    return VarianceComponents(max(0.0, float(np.var(means, ddof=1)) - within / draws), within, draws)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        raise ValueError(f"an interval needs values of at least two seeds, got {array.tolist()}")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(array)))} of {values} is not finite")
    return array


def scipy_stats() -> ModuleType:
    """Import `scipy.stats`; the `ImportError` names the extra to install."""
    try:
        from scipy import stats
    except ImportError as error:
        raise missing("the confidence interval", "scipy", "compare") from error
    return stats
