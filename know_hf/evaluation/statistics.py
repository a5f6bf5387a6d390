"""How sure a comparison is: means with intervals, paired differences, correction for the number of arms.

What is counted are trajectories. Several downstream draws of one trajectory share its weights and are not independent:
they are averaged first ([`cluster_means`]), and the t-test is one over these means, with as many degrees of freedom as
there are trajectories less one. With the same number of draws of each trajectory this is exactly the test of a mixed
model with a random effect of the trajectory, and it needs no estimate of that effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np

_NO_SPREAD = 1e-12  # of the largest difference: below it the differences are equal, but for rounding


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
        p_value (`float`): Of the two-sided paired t-test against a mean difference of 0; 1 where all differences are
            equal, since without any spread nothing says how sure they are.
        effect_size (`float`, *optional*): Cohen's d_z, the mean over the standard deviation of the differences; `None`
            where all differences are equal.
        minimum_detectable (`float`, *optional*): The smallest true difference that the design would have found with a
            power of 80 %, in the units of the values, given the spread of the differences; see
            [`minimum_detectable_effect`]. `None` where they have none.
    """

    p_value: float
    effect_size: float | None = None
    minimum_detectable: float | None = None


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
    half_width = float(scipy_stats().t.ppf((1 + level) / 2, len(array) - 1)) * error
    return Estimate(mean, mean - half_width, mean + half_width)


def paired_difference(
    values: Sequence[float], reference: Sequence[float], level: float = 0.95, num_tests: int = 1
) -> PairedDifference:
    """The mean of `values − reference` over seeds, its interval, and the p of a two-sided paired t-test.

    Args:
        values, reference (`Sequence[float]` of length n): One value a seed, in the same order of seeds.
        level (`float`, *optional*, defaults to `0.95`): Coverage of the interval.
        num_tests (`int`, *optional*, defaults to `1`): Differences that are tested together. The smallest detectable
            one is that at the level `(1 - level) / num_tests`, the strictest that Holm's correction can ask for.

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
    deviation = float(difference.std(ddof=1))
    if deviation <= _NO_SPREAD * float(np.abs(difference).max()):  # t is 0/0 or infinite: there is nothing to test by
        return PairedDifference(estimate.mean, estimate.low, estimate.high, 1.0)
    n = len(difference)
    p_value = float(2 * scipy_stats().t.sf(abs(estimate.mean) / deviation * np.sqrt(n), n - 1))
    detectable = deviation * minimum_detectable_effect(n, (1 - level) / num_tests)
    return PairedDifference(estimate.mean, estimate.low, estimate.high, p_value, estimate.mean / deviation, detectable)


@cache
def minimum_detectable_effect(n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest effect, in standard deviations of the differences, that a paired t-test finds with a given power.

    It is the d at which the noncentral t distribution with `n - 1` degrees of freedom and noncentrality `d √n` puts
    `power` outside of the two-sided limits of the test (J. Cohen, *Statistical Power Analysis*, 1988).

    Args:
        n (`int`): Number of pairs, at least 2.
        alpha (`float`, *optional*, defaults to `0.05`): Level of the two-sided test.
        power (`float`, *optional*, defaults to `0.8`): Chance to find the effect.

    Raises:
        `ValueError`: for fewer than two pairs.
        `ImportError`: when scipy is missing.
    """
    if n < 2:
        raise ValueError(f"a paired test needs at least two pairs, got {n}")
    stats = scipy_stats()
    from scipy.optimize import brentq

    limit = float(stats.t.ppf(1 - alpha / 2, n - 1))

    def lacking(noncentrality: float) -> float:
        return float(stats.nct.sf(limit, n - 1, noncentrality)) - power

    upper = limit + 1
    while lacking(upper) < 0:
        upper *= 2
    return float(brentq(lacking, 0, upper)) / float(np.sqrt(n))


def cluster_means(draws: Sequence[Sequence[float]]) -> list[float]:
    """The mean over the draws of each trajectory, which is what the tests count.

    Args:
        draws (sequence of sequences): One sequence a trajectory, with a value for each of its draws.

    Raises:
        `ValueError`: for a trajectory without a draw.
    """
    for number, values in enumerate(draws):
        if not len(values):
            raise ValueError(f"trajectory number {number} has no draw to take a mean of")
    return [float(np.mean(values)) for values in draws]


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


def scipy_stats() -> ModuleType:
    """`scipy.stats`; raises `ImportError` with what to install where it is missing."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "confidence intervals need scipy, which comes with the extra 'compare': pip install 'know_hf[compare]'"
        ) from error
    return stats
