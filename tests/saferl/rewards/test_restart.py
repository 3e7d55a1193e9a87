"""Makespans against worked values, limits and simulation; the break-even; the decision from counts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from saferl.errors import UsageError
from saferl.rewards.restart import (
    AttemptTimes,
    OutcomeCounts,
    OutcomeRates,
    Saving,
    abort_saving,
    aborting_pays,
    expected_makespan,
    never_abort_makespan,
    should_abort,
    simulate_makespans,
    success_probability,
)

TIMES = AttemptTimes(success=40, failure=80, abort=15, overhead=1)
RATES = OutcomeRates(tp=0.40, fn=0.05, tn=0.30, fp=0.10, ncs=0.05, ncf=0.10)


def test_the_worked_makespan() -> None:
    assert expected_makespan(RATES, TIMES) == pytest.approx(89.444, abs=1e-3)
    # The published form forgets that an undecided failure is repeated too; both agree where there is none.
    assert expected_makespan(RATES, TIMES) * 0.45 / 0.55 == pytest.approx(73.182, abs=1e-3)
    decided = OutcomeRates.of_detector(0.5, 0.9, 0.8)
    published = expected_makespan(decided, TIMES) * decided.tp / (1 - decided.fn - decided.fp - decided.tn)
    assert published == pytest.approx(expected_makespan(decided, TIMES))


@pytest.mark.parametrize("law", ["exponential", "fixed"])
def test_simulation_agrees_whatever_the_law_of_the_times(law: str) -> None:
    rng = np.random.default_rng(0)
    makespans, succeeded = simulate_makespans(RATES, TIMES, 40_000, rng, law=law)  # type: ignore[arg-type]
    assert succeeded.all()
    assert makespans.mean() == pytest.approx(89.444, rel=0.01)


def test_simulation_agrees_on_random_tasks() -> None:
    rng = np.random.default_rng(1)
    for _ in range(10):
        values = rng.dirichlet(np.ones(6)) * 0.8 + np.array([0.2, 0, 0, 0, 0, 0])
        rates, times = OutcomeRates(*values.tolist()), AttemptTimes(*rng.uniform(1, 100, 4).tolist())
        makespans, _ = simulate_makespans(rates, times, 40_000, rng)
        error = makespans.std() / math.sqrt(len(makespans))
        assert makespans.mean() == pytest.approx(expected_makespan(rates, times), abs=5 * error)


def test_a_cap_on_attempts() -> None:
    makespans, succeeded = simulate_makespans(RATES, TIMES, 40_000, np.random.default_rng(2), max_attempts=3)
    assert success_probability(RATES, 3) == pytest.approx(1 - 0.55**3)
    assert succeeded.mean() == pytest.approx(1 - 0.55**3, abs=0.01)
    assert makespans.mean() == pytest.approx(expected_makespan(RATES, TIMES, max_attempts=3), rel=0.01)
    assert expected_makespan(RATES, TIMES, 10_000) == pytest.approx(expected_makespan(RATES, TIMES))
    assert expected_makespan(RATES, TIMES, 1) == pytest.approx(0.45 * expected_makespan(RATES, TIMES))


def test_a_part_that_never_fits() -> None:
    hopeless = OutcomeRates(tp=0, fn=0, tn=0.5, fp=0.5)
    assert expected_makespan(hopeless, TIMES) == math.inf
    assert expected_makespan(hopeless, TIMES, max_attempts=4) == 4 * (1 + 0.5 * 15 + 0.5 * 80)
    assert success_probability(hopeless, 4) == 0
    assert never_abort_makespan(0.0, TIMES) == math.inf
    makespans, succeeded = simulate_makespans(
        hopeless, TIMES, 50, np.random.default_rng(0), law="fixed", max_attempts=4
    )
    assert not succeeded.any()
    assert (makespans >= 4 * 16).all()


def test_break_even_example() -> None:
    assert never_abort_makespan(0.5, TIMES) == 122
    assert expected_makespan(OutcomeRates.of_detector(0.5, 0.9, 0.8), TIMES) == pytest.approx(75)
    assert aborting_pays(0.5, 0.9, 0.8, TIMES)
    # The left side is 6.85 for T_N = 15 and 28 where T_N = 62.
    assert aborting_pays(0.5, 0.9, 0.8, AttemptTimes(40, 80, 61.9, 1))
    assert not aborting_pays(0.5, 0.9, 0.8, AttemptTimes(40, 80, 62.1, 1))


def test_the_break_even_is_the_comparison_of_makespans() -> None:
    rng = np.random.default_rng(3)
    answers = []
    for p, a, b, *times in rng.uniform(0.02, 1, (5000, 7)).tolist():
        clock = AttemptTimes(*(100 * t for t in times))
        aborting = expected_makespan(OutcomeRates.of_detector(p, a, b), clock)
        staying = never_abort_makespan(p, clock)
        if abs(aborting - staying) > 1e-9 * staying:
            answers.append(aborting_pays(p, a, b, clock))
            assert answers[-1] == (aborting < staying)
            assert not (answers[-1] and a + b <= 1)
    assert 200 < np.sum(answers) < 4000  # both answers occur


def test_limits() -> None:
    p = 0.3
    for abort in (1.0, 500.0):
        times = AttemptTimes(40, 80, abort)
        deaf = expected_makespan(OutcomeRates.of_detector(p, 1, 0), times)
        assert deaf == pytest.approx(never_abort_makespan(p, times))
        perfect = expected_makespan(OutcomeRates.of_detector(p, 1, 1), times)
        assert perfect == pytest.approx((1 + p * 40 + (1 - p) * abort) / p)
    assert not aborting_pays(1.0, 0.9, 1.0, TIMES)
    assert not aborting_pays(1.0, 1.0, 1.0, TIMES)
    spans = [expected_makespan(OutcomeRates.of_detector(p, 0.8, b), TIMES) for b in np.linspace(0, 1, 9)]
    assert all(np.diff(spans) < 0)
    slow = AttemptTimes(40, 80, 90)
    spans = [expected_makespan(OutcomeRates.of_detector(p, 0.8, b), slow) for b in np.linspace(0, 1, 9)]
    assert all(np.diff(spans) > 0)


def test_the_saving_and_its_lower_bound() -> None:
    counts = OutcomeCounts(tp=45, fn=5, tn=40, fp=10)
    saving = abort_saving(counts, TIMES, np.random.default_rng(0))
    assert saving.estimate == pytest.approx(1 - 75 / 122)
    assert 0 < saving.lower_bound < saving.estimate
    assert should_abort(saving)
    more = OutcomeCounts(tp=4500, fn=500, tn=4000, fp=1000)
    tighter = abort_saving(more, TIMES, np.random.default_rng(0))
    assert saving.lower_bound < tighter.lower_bound < tighter.estimate == pytest.approx(saving.estimate)
    surer = abort_saving(counts, TIMES, np.random.default_rng(0), confidence=0.999)
    assert surer.lower_bound < saving.lower_bound


def test_few_attempts_are_not_enough_to_switch() -> None:
    few = OutcomeCounts(tp=3, fn=2, tn=3, fp=1)
    times = AttemptTimes(40, 80, 15)
    saving = abort_saving(few, times, np.random.default_rng(0))
    assert saving.lower_bound < 0 < saving.estimate
    assert not should_abort(saving)
    many = OutcomeCounts(tp=300, fn=200, tn=300, fp=100)
    assert should_abort(abort_saving(many, times, np.random.default_rng(0)))
    assert not should_abort(Saving(estimate=0.1, lower_bound=0.0))


def test_the_bound_covers_the_true_saving() -> None:
    rng = np.random.default_rng(4)
    truth = 1 - 75 / 122
    counted = rng.multinomial(150, [0.45, 0.05, 0.40, 0.10], size=200)
    below = [
        abort_saving(OutcomeCounts(*row), TIMES, rng, confidence=0.9, resamples=400).lower_bound <= truth
        for row in counted.tolist()
    ]
    assert 0.82 < np.mean(below) < 0.97


def test_undecided_attempts_and_attempts_without_success() -> None:
    counts = OutcomeCounts(tp=40, fn=5, tn=30, fp=10, ncs=5, ncf=10)
    saving = abort_saving(counts, TIMES, np.random.default_rng(0))
    assert saving.estimate == pytest.approx(
        1 - 89.4444 / never_abort_makespan(RATES.success_rate, TIMES), abs=1e-5
    )
    hopeless = abort_saving(OutcomeCounts(0, 3, 5, 2), TIMES, np.random.default_rng(0))
    assert hopeless == Saving(-math.inf, -math.inf)
    assert not should_abort(hopeless)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="sum to 1"):
        OutcomeRates(tp=0.9, fn=0.1, tn=0.3, fp=0.1)
    with pytest.raises(UsageError, match="at least 0"):
        OutcomeRates(tp=1.2, fn=-0.2, tn=0, fp=0)
    with pytest.raises(UsageError, match="sum to 1"):
        OutcomeRates(tp=math.nan, fn=0, tn=0, fp=0)
    with pytest.raises(UsageError, match="negative"):
        OutcomeCounts(-1, 2, 3, 4)
    with pytest.raises(UsageError, match="positive"):
        OutcomeCounts(0, 0, 0, 0)
    with pytest.raises(UsageError, match="times"):
        AttemptTimes(40, math.inf, 15)
    with pytest.raises(UsageError, match="recall"):
        aborting_pays(0.5, 1.1, 0.5, TIMES)
    with pytest.raises(UsageError, match="success rate is 0"):
        aborting_pays(0.0, 0.9, 0.5, TIMES)
    with pytest.raises(UsageError, match="cap"):
        expected_makespan(RATES, TIMES, max_attempts=0)
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="law"):
        simulate_makespans(RATES, TIMES, 5, rng, law="normal")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="episodes"):
        simulate_makespans(RATES, TIMES, 0, rng)
    with pytest.raises(UsageError, match="confidence"):
        abort_saving(OutcomeCounts(1, 1, 1, 1), TIMES, rng, confidence=1.0)
    with pytest.raises(UsageError, match="resamples"):
        abort_saving(OutcomeCounts(1, 1, 1, 1), TIMES, rng, resamples=0)
