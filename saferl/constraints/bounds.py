"""One-sided upper confidence bounds on a mean: with probability `confidence`, mean <= bound.

Every function takes samples of shape (..., n), bounds along the last axis and returns shape (...).
Which to choose: `student_t` is exact for normal samples alone, and on rare or skewed costs it passes far
too often; the others hold for any distribution on a declared range (Clopper-Pearson for 0/1 costs).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferl.errors import UsageError, unknown_name

Method = Literal["student_t", "hoeffding", "empirical_bernstein", "clopper_pearson", "bootstrap"]
METHODS: tuple[Method, ...] = (
    "student_t",
    "hoeffding",
    "empirical_bernstein",
    "clopper_pearson",
    "bootstrap",
)

Floats = NDArray[np.float64]


def check_confidence(confidence: float) -> None:
    """Raise `UsageError` unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise UsageError(f"the confidence is {confidence:g}; it must lie between 0 and 1, such as 0.95.")


def check_method(method: str, lower: float | None, upper: float | None) -> None:
    """Raise `UsageError` unless the method is known and has the range of the costs if it needs one."""
    if method not in METHODS:
        raise unknown_name("bound", method, METHODS)
    if method in ("hoeffding", "empirical_bernstein") and (lower is None or upper is None):
        raise UsageError(f"{method} needs the range of the costs; pass lower and upper.")


def student_t_factor(count: int, confidence: float) -> float:
    """t_{confidence, n-1} / sqrt(n), the factor of the sample standard deviation; infinite for n < 2."""
    if count < 2:
        return math.inf
    from scipy.special import stdtrit  # the quantile alone; scipy.stats takes a second to import

    return float(stdtrit(count - 1, confidence)) / math.sqrt(count)


def student_t_bound(samples: ArrayLike, confidence: float) -> Floats:
    """m + s t_{confidence, n-1} / sqrt(n), exact for normal samples (n >= 2; infinite for one)."""
    x = _samples(samples, confidence)
    if x.shape[-1] < 2:
        return np.full(x.shape[:-1], np.inf)
    return np.asarray(x.mean(-1) + x.std(-1, ddof=1) * student_t_factor(x.shape[-1], confidence))


def hoeffding_bound(samples: ArrayLike, confidence: float, *, lower: float, upper: float) -> Floats:
    """m + (b - a) sqrt(ln(1 / delta) / (2 n)) for samples in [a, b] (Hoeffding 1963, theorem 2)."""
    x = _in_range(_samples(samples, confidence), lower, upper)
    width = (upper - lower) * math.sqrt(math.log(1 / (1 - confidence)) / (2 * x.shape[-1]))
    return np.asarray(x.mean(-1) + width)


def empirical_bernstein_bound(samples: ArrayLike, confidence: float, *, lower: float, upper: float) -> Floats:
    """m + s sqrt(2 ln(2 / delta) / n) + 7 (b - a) ln(2 / delta) / (3 (n - 1)) for samples in [a, b].

    Maurer and Pontil 2009, theorem 4; tighter than Hoeffding where the deviation s is small and n is
    not. Infinite for one sample.
    """
    x = _in_range(_samples(samples, confidence), lower, upper)
    n = x.shape[-1]
    if n < 2:
        return np.full(x.shape[:-1], np.inf)
    log = math.log(2 / (1 - confidence))
    width = x.std(-1, ddof=1) * math.sqrt(2 * log / n) + 7 * (upper - lower) * log / (3 * (n - 1))
    return np.asarray(x.mean(-1) + width)


def clopper_pearson_bound(samples: ArrayLike, confidence: float) -> Floats:
    """BetaInv(confidence; k + 1, n - k), exact for 0/1 samples (Clopper and Pearson 1934)."""
    x = _samples(samples, confidence)
    if not np.isin(x, (0.0, 1.0)).all():
        raise UsageError(
            "clopper_pearson takes 0/1 costs; threshold them, or use empirical_bernstein with their range."
        )
    from scipy.special import betaincinv

    successes, n = x.sum(-1), x.shape[-1]
    open_end = successes >= n
    bound = betaincinv(successes + 1, np.where(open_end, 1.0, n - successes), confidence)
    return np.asarray(np.where(open_end, 1.0, bound), dtype=np.float64)


def bootstrap_bound(samples: ArrayLike, confidence: float, *, resamples: int = 2000, seed: int = 0) -> Floats:
    """The bootstrap-t bound m - s q / sqrt(n) (Efron 1982; Hall 1988).

    q is the (1 - confidence) quantile of t* = (m* - m) sqrt(n) / s* over resamples drawn with
    replacement. It corrects for skew to second order, yet promises nothing at small n: a rare cost that
    is absent from the samples is absent from every resample. Deterministic for a given seed.
    """
    x = _samples(samples, confidence)
    n = x.shape[-1]
    if n < 2:
        return np.full(x.shape[:-1], np.inf)
    flat = x.reshape(-1, n)
    generator = np.random.default_rng(seed)
    bounds = np.empty(len(flat))
    for row, sample in enumerate(flat):
        drawn = sample[generator.integers(n, size=(resamples, n))]
        mean, std = sample.mean(), sample.std(ddof=1)
        deviation = drawn.std(-1, ddof=1)
        gap = drawn.mean(-1) - mean
        with np.errstate(divide="ignore", invalid="ignore"):
            # A resample of equal values has no spread: its statistic is infinite, in the gap's direction.
            t = np.where(deviation > 0, gap * math.sqrt(n) / deviation, np.where(gap == 0, 0.0, gap * np.inf))
        quantile = np.quantile(t, 1 - confidence, method="inverted_cdf")
        bounds[row] = mean if std == 0 else mean - std * quantile / math.sqrt(n)
    return bounds.reshape(x.shape[:-1])


def upper_bound(
    samples: ArrayLike,
    confidence: float,
    method: Method = "student_t",
    lower: float | None = None,
    upper: float | None = None,
) -> Floats:
    """The bound of the named method.

    Args:
        samples: shape (..., n), n >= 1.
        confidence: probability with which the mean is at most the bound.
        method: one of `METHODS`.
        lower: least possible sample, for hoeffding and empirical_bernstein.
        upper: largest possible sample, likewise.

    Raises:
        UsageError: unknown method, missing or violated range, no samples, impossible confidence.
    """
    check_method(method, lower, upper)
    ranged: dict[str, Any] = {"hoeffding": hoeffding_bound, "empirical_bernstein": empirical_bernstein_bound}
    if method in ranged:
        bounded: Floats = ranged[method](samples, confidence, lower=lower, upper=upper)
        return bounded
    if method == "student_t":
        return student_t_bound(samples, confidence)
    if method == "clopper_pearson":
        return clopper_pearson_bound(samples, confidence)
    return bootstrap_bound(samples, confidence)


def _samples(samples: ArrayLike, confidence: float) -> Floats:
    check_confidence(confidence)
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise UsageError("a confidence bound needs at least one sample.")
    if not np.isfinite(x).all():
        raise UsageError("a sample is NaN or infinite; a bound on the mean would be meaningless.")
    return x


def _in_range(x: Floats, lower: float, upper: float) -> Floats:
    if not lower < upper:
        raise UsageError(f"the range [{lower:g}, {upper:g}] is empty; lower must be less than upper.")
    if x.min() < lower or x.max() > upper:
        raise UsageError(
            f"a sample lies outside the declared range [{lower:g}, {upper:g}]; the bound would not hold."
        )
    return x
