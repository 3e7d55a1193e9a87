"""Restart or continue: whether to abort an attempt that is predicted to fail, and what that saves.

A task is attempted until it succeeds. A predictor may announce a failure, upon which the attempt is aborted
and the next begins (Watson and Correll 2023, "Optimal decision making in robotic assembly and other
trial-and-error tasks", arXiv 2301.10846). Attempts must be independent: where failures are correlated, as for
a part that never fits, no expectation here holds, and `max_attempts` is the safeguard. Times have any one
unit (seconds, steps, tokens). The formulas are renewal arguments of our own; the paper's symbols are
unverified.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saferl.errors import UsageError

__all__ = [
    "AttemptTimes",
    "OutcomeCounts",
    "OutcomeRates",
    "Saving",
    "abort_saving",
    "aborting_pays",
    "expected_makespan",
    "never_abort_makespan",
    "should_abort",
    "simulate_makespans",
    "success_probability",
]


@dataclass(frozen=True)
class AttemptTimes:
    """Mean times of an attempt by how it ends, and the overhead added to every attempt.

    Args:
        success: T_S, until success.
        failure: T_F, until failure is evident.
        abort: T_N, until the predictor says "will fail".
        overhead: t0, for instance of a reset; 1 in the published research code.

    Raises:
        UsageError: a time is negative or not finite.
    """

    success: float
    failure: float
    abort: float
    overhead: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= time < math.inf for time in astuple(self)):
            raise UsageError(f"the attempt times are {astuple(self)}; each must be finite and at least 0.")


@dataclass(frozen=True)
class OutcomeRates:
    """Joint probabilities of what an attempt would be and what the predictor says of it; their sum is 1.

    Args:
        tp: success, allowed to go on.
        fn: success, aborted.
        tn: failure, aborted.
        fp: failure, allowed to go on.
        ncs: success before the predictor decided.
        ncf: failure before the predictor decided.

    Raises:
        UsageError: a value is negative, or they do not sum to 1.
    """

    tp: float
    fn: float
    tn: float
    fp: float
    ncs: float = 0.0
    ncf: float = 0.0

    def __post_init__(self) -> None:
        values = astuple(self)
        if not (min(values) >= 0 and abs(math.fsum(values) - 1) <= 1e-9):
            raise UsageError(f"the outcome rates are {values}; they must be at least 0 and sum to 1.")

    @classmethod
    def of_detector(cls, success_rate: float, recall: float, specificity: float) -> OutcomeRates:
        """A predictor that always decides.

        The recall is P(allowed | success), the specificity P(aborted | failure). Raises `UsageError` for a
        value outside [0, 1].
        """
        _check_probabilities(success_rate=success_rate, recall=recall, specificity=specificity)
        failure_rate = 1 - success_rate
        return cls(
            tp=success_rate * recall,
            fn=success_rate * (1 - recall),
            tn=failure_rate * specificity,
            fp=failure_rate * (1 - specificity),
        )

    @property
    def success_rate(self) -> float:
        """The chance that an attempt would succeed if it were never aborted."""
        return self.tp + self.fn + self.ncs


@dataclass(frozen=True)
class OutcomeCounts:
    """Counted attempts, fields as in `OutcomeRates`.

    To know whether an aborted attempt would have succeeded, they must be recorded while the predictor runs
    along without being obeyed. Raises `UsageError` for a negative count and for no attempt at all.
    """

    tp: int
    fn: int
    tn: int
    fp: int
    ncs: int = 0
    ncf: int = 0

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or sum(astuple(self)) == 0:
            raise UsageError(
                f"the outcome counts are {astuple(self)}; none may be negative and one must be positive."
            )


@dataclass(frozen=True)
class Saving:
    """The share of the makespan that aborting saves, 1 - M / M0, as counted and as a lower bound."""

    estimate: float
    lower_bound: float


def expected_makespan(rates: OutcomeRates, times: AttemptTimes, max_attempts: int | None = None) -> float:
    """Mean time until success when predicted failures are aborted; infinite if no attempt can succeed.

        M = (t0 + T_F (FP + NCF) + T_S (TP + NCS) + T_N (FN + TN)) / (TP + NCS)

    The research code for the paper divides by 1 - FN - FP - TN instead, which takes an undecided failure for
    an end and is too small where NCF > 0. With `max_attempts` m it is the mean time until success or giving
    up, M (1 - (1 - q)^m) with q = TP + NCS; compare such times only beside `success_probability`. Raises
    `UsageError` for a cap below 1.
    """
    q = rates.tp + rates.ncs
    attempt = float(times.overhead + np.array(astuple(rates)) @ _times_by_outcome(times))
    if max_attempts is None:
        return attempt / q if q > 0 else math.inf
    _check_cap(max_attempts)
    return attempt * (success_probability(rates, max_attempts) / q if q > 0 else max_attempts)


def success_probability(rates: OutcomeRates, max_attempts: int) -> float:
    """The chance to succeed within `max_attempts` when predicted failures are aborted."""
    _check_cap(max_attempts)
    q = min(rates.tp + rates.ncs, 1.0)
    return 1.0 if q == 1 else -math.expm1(max_attempts * math.log1p(-q))


def never_abort_makespan(success_rate: float, times: AttemptTimes) -> float:
    """M0 = (t0 + p T_S + (1 - p) T_F) / p, infinite for p = 0. Raises `UsageError` unless 0 <= p <= 1."""
    _check_probabilities(success_rate=success_rate)
    attempt = times.overhead + success_rate * times.success + (1 - success_rate) * times.failure
    return attempt / success_rate if success_rate > 0 else math.inf


def aborting_pays(success_rate: float, recall: float, specificity: float, times: AttemptTimes) -> bool:
    """Whether M < M0 for a predictor that always decides, with p the success rate, a recall, b specificity.

        T_N (p (1 - a) + (1 - p) b) + (1 - a) t0  <  (1 - p) T_F (a + b - 1)

    A predictor no better than chance (a + b <= 1) therefore never pays. Raises `UsageError` for a value
    outside [0, 1] and for p = 0, where neither makespan is finite.
    """
    _check_probabilities(success_rate=success_rate, recall=recall, specificity=specificity)
    if success_rate == 0:
        raise UsageError("the success rate is 0; without success no makespan is finite.")
    aborted = success_rate * (1 - recall) + (1 - success_rate) * specificity
    cost = times.abort * aborted + (1 - recall) * times.overhead
    return cost < (1 - success_rate) * times.failure * (recall + specificity - 1)


def simulate_makespans(
    rates: OutcomeRates,
    times: AttemptTimes,
    episodes: int,
    rng: np.random.Generator,
    *,
    law: Literal["exponential", "fixed"] = "exponential",
    max_attempts: int = 10_000,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Makespans (episodes,) of simulated tasks, and which of them succeeded within `max_attempts`.

    Attempts are simulated one after another in all unfinished episodes at once; their times are exponential
    with the given means, or exactly those means. Raises `UsageError` for an unknown law and for less than one
    episode or attempt.
    """
    if law not in ("exponential", "fixed"):
        raise UsageError(f"the law of the times is {law!r}; it must be 'exponential' or 'fixed'.")
    if episodes < 1:
        raise UsageError(f"the number of episodes is {episodes}; it must be at least 1.")
    _check_cap(max_attempts)
    values = np.array(astuple(rates))
    values /= values.sum()
    means = _times_by_outcome(times)
    succeeds = np.array([True, False, False, False, True, False])
    makespans = np.zeros(episodes)
    succeeded = np.zeros(episodes, dtype=bool)
    for _ in range(max_attempts):
        running = np.flatnonzero(~succeeded)
        if running.size == 0:
            break
        outcomes = rng.choice(6, size=running.size, p=values)
        spent = means[outcomes]
        makespans[running] += times.overhead + (rng.exponential(spent) if law == "exponential" else spent)
        succeeded[running] = succeeds[outcomes]
    return makespans, succeeded


def abort_saving(
    counts: OutcomeCounts,
    times: AttemptTimes,
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Saving:
    """The saving of aborting, estimated from counted attempts, with its one-sided bootstrap lower bound.

    The bound is the (1 - confidence) quantile over confusion matrices resampled from the counted one; a
    resample without success counts as no saving at all. A cell counted 0 stays 0 in every resample, so with
    few attempts the bound is too high. The times are taken as known. Raises `UsageError` for a confidence
    outside (0, 1) and for no resample.
    """
    if not 0 < confidence < 1:
        raise UsageError(f"the confidence is {confidence:g}; it must lie strictly between 0 and 1.")
    if resamples < 1:
        raise UsageError(f"the number of bootstrap resamples is {resamples}; it must be at least 1.")
    counted = np.array(astuple(counts))
    total = int(counted.sum())
    resampled = rng.multinomial(total, counted / total, size=resamples) / total
    savings = _saved_shares(resampled, times)
    lower = np.quantile(savings, 1 - confidence, method="lower")
    return Saving(float(_saved_shares(counted[None] / total, times)[0]), float(lower))


def should_abort(saving: Saving) -> bool:
    """Whether to obey the predictor: only when even the lower bound of the saving is positive."""
    return saving.lower_bound > 0


def _saved_shares(rates: NDArray[np.float64], times: AttemptTimes) -> NDArray[np.float64]:
    """1 - M / M0 of rates (N, 6); minus infinity where no attempt that is allowed to go on succeeds."""
    tp, fn, _, _, ncs, _ = rates.T
    q, p = tp + ncs, tp + fn + ncs
    aborting = times.overhead + rates @ _times_by_outcome(times)
    staying = times.overhead + times.success * p + times.failure * (1 - p)
    ratio = np.full(len(rates), np.inf)
    np.divide(aborting * p, staying * q, out=ratio, where=staying * q > 0)
    return 1 - ratio


def _times_by_outcome(times: AttemptTimes) -> NDArray[np.float64]:
    """The mean time of each outcome (6,) when predicted failures are aborted, in the order of the rates."""
    return np.array([times.success, times.abort, times.abort, times.failure, times.success, times.failure])


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UsageError(f"the {name.replace('_', ' ')} is {value:g}; it must be between 0 and 1.")


def _check_cap(max_attempts: int) -> None:
    if max_attempts < 1:
        raise UsageError(f"the cap on attempts is {max_attempts}; it must be at least 1.")
