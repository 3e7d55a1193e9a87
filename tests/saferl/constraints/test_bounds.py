"""Confidence bounds and the safety test: worked numbers, coverage, and promises on rare costs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saferl.constraints import (
    METHODS,
    SafetyTest,
    bootstrap_bound,
    clopper_pearson_bound,
    empirical_bernstein_bound,
    hoeffding_bound,
    student_t_bound,
    upper_bound,
)
from saferl.errors import UsageError

COSTS = [-2, -1, 0, -3, 1, -2, -1.5, -0.5, -2.5, -1.5]


@pytest.mark.parametrize(("delta", "bound"), [(0.1, -0.772350), (0.05, -0.600635), (0.01, -0.223572)])
def test_student_t_numbers(delta: float, bound: float) -> None:
    assert student_t_bound(COSTS, 1 - delta) == pytest.approx(bound, abs=1e-6)


def test_hoeffding_number() -> None:
    # The published example declares a width of 10; the mean of -1.3 stays far from the upper end.
    assert hoeffding_bound(COSTS, 0.9, lower=-5, upper=5) == pytest.approx(2.093070, abs=1e-6)


def test_empirical_bernstein_by_hand() -> None:
    x = np.array([0.0, 1.0, 0.0, 1.0] * 25)
    log = np.log(2 / 0.1)
    expected = 0.5 + x.std(ddof=1) * np.sqrt(2 * log / 100) + 7 * log / (3 * 99)
    assert empirical_bernstein_bound(x, 0.9, lower=0, upper=1) == pytest.approx(expected)


def test_clopper_pearson_is_the_exact_binomial_bound() -> None:
    from scipy.stats import binom

    for successes, n in ((0, 20), (1, 20), (7, 20), (19, 20)):
        x = np.arange(n) < successes
        bound = float(clopper_pearson_bound(x, 0.95))
        # At the bound, seeing this few successes or fewer has probability exactly 0.05.
        assert binom.cdf(successes, n, bound) == pytest.approx(0.05, abs=1e-9)
    assert clopper_pearson_bound(np.ones(5), 0.95) == 1.0


def test_bootstrap_agrees_with_student_t_on_normal_samples_and_corrects_for_skew() -> None:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=400)
    assert bootstrap_bound(normal, 0.95) == pytest.approx(float(student_t_bound(normal, 0.95)), abs=0.02)
    skewed = rng.lognormal(sigma=1.5, size=200)
    assert bootstrap_bound(skewed, 0.95) > student_t_bound(skewed, 0.95)
    assert bootstrap_bound(skewed, 0.95) == bootstrap_bound(skewed, 0.95)
    assert bootstrap_bound([2.0, 2.0, 2.0], 0.95) == 2.0


def test_batches_are_bounded_row_by_row() -> None:
    x = np.random.default_rng(0).uniform(size=(3, 2, 40)).round()
    for method in METHODS:
        batch = upper_bound(x, 0.9, method, lower=0, upper=1)
        assert batch.shape == (3, 2)
        assert batch[1, 1] == pytest.approx(float(upper_bound(x[1, 1], 0.9, method, lower=0, upper=1)))


samples = st.lists(st.floats(0, 1), min_size=2, max_size=30)


@given(samples)
def test_bounds_lie_above_the_mean_and_grow_with_confidence(x: list[float]) -> None:
    for method in ("student_t", "hoeffding", "empirical_bernstein"):
        low, high = (float(upper_bound(x, c, method, lower=0, upper=1)) for c in (0.8, 0.99))
        assert np.mean(x) - 1e-12 <= low <= high + 1e-12


@given(samples)
def test_bounds_shrink_with_more_of_the_same_and_grow_with_spread(x: list[float]) -> None:
    wider = [0.5 + 1.5 * (v - 0.5) for v in x]
    for method in ("student_t", "hoeffding", "empirical_bernstein"):
        kwargs = {"lower": -1.0, "upper": 2.0}
        once = float(upper_bound(x, 0.9, method, **kwargs)) - np.mean(x)
        tenfold = float(upper_bound(x * 10, 0.9, method, **kwargs)) - np.mean(x)
        spread = float(upper_bound(wider, 0.9, method, **kwargs)) - np.mean(wider)
        assert tenfold <= once + 1e-9
        assert spread >= once - 1e-9


def test_student_t_covers_normal_means() -> None:
    x = np.random.default_rng(0).normal(size=(20_000, 100))
    missed = (student_t_bound(x, 0.9) < 0).mean()
    assert 0.08 <= missed <= 0.12


def test_on_rare_costs_student_t_breaks_its_promise_and_bounded_tests_keep_it() -> None:
    """A policy exactly on its limit: each costs 10 with probability 1 %; nominal false passes 10 %."""
    rng = np.random.default_rng(0)
    expected = {20: 0.812, 100: 0.379, 1000: 0.125}
    for n, share in expected.items():
        costs = 10.0 * (rng.uniform(size=(4000, n)) < 0.01)
        passed = (student_t_bound(costs, 0.9) <= 0.1).mean()
        assert passed == pytest.approx(share, abs=0.03)
        for method in ("hoeffding", "empirical_bernstein"):
            assert (upper_bound(costs, 0.9, method, lower=0, upper=10) <= 0.1).mean() <= 0.1
        assert (clopper_pearson_bound(costs > 0, 0.9) <= 0.01).mean() <= 0.1


@pytest.mark.parametrize(("n", "share"), [(20, 0.340), (100, 0.252), (1000, 0.174)])
def test_on_skewed_costs_student_t_passes_too_often(n: int, share: float) -> None:
    rng = np.random.default_rng(1)
    costs = rng.lognormal(sigma=1.5, size=(4000, n)) - np.exp(1.5**2 / 2)
    assert (student_t_bound(costs, 0.9) <= 0).mean() == pytest.approx(share, abs=0.03)


def test_on_skewed_costs_bootstrap_t_passes_less_often_than_student_t() -> None:
    rng = np.random.default_rng(2)
    costs = rng.lognormal(sigma=1.5, size=(300, 100)) - np.exp(1.5**2 / 2)
    passed = (bootstrap_bound(costs, 0.9, resamples=500) <= 0).mean()
    assert passed < (student_t_bound(costs, 0.9) <= 0).mean() - 0.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: student_t_bound([], 0.9), "at least one sample"),
        (lambda: student_t_bound([1.0], 1.0), "between 0 and 1"),
        (lambda: student_t_bound([np.nan, 1.0], 0.9), "NaN"),
        (lambda: hoeffding_bound([1.0, 3.0], 0.9, lower=0, upper=2), "outside the declared range"),
        (lambda: hoeffding_bound([1.0], 0.9, lower=2, upper=2), "is empty"),
        (lambda: clopper_pearson_bound([0.5], 0.9), "0/1"),
        (lambda: upper_bound([1.0], 0.9, "hoeffding"), "pass lower and upper"),
        (lambda: upper_bound([1.0], 0.9, "studentt"), "did you mean 'student_t'"),
    ],
)
def test_bad_input_is_one_sentence(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=words):
        call()


def test_a_single_sample_bounds_nothing() -> None:
    assert student_t_bound([1.0], 0.9) == np.inf
    assert bootstrap_bound([1.0], 0.9) == np.inf
    assert empirical_bernstein_bound([1.0], 0.9, lower=0, upper=2) == np.inf


# --- the safety test ---------------------------------------------------------------------------------

# The published example has a single positive cost, of which a Student-t test warns.
one_positive = pytest.mark.filterwarnings("ignore:only 1 costs are positive")


def test_impossible_tests_are_refused() -> None:
    for make in (
        lambda: SafetyTest(float("nan")),
        lambda: SafetyTest(0.0, looks=0),
        lambda: SafetyTest(0.0, confidence=1.0),
        lambda: SafetyTest(0.0, method="hoeffding"),
        lambda: SafetyTest(0.0, method="student"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError):
            make()


@one_positive
def test_pass_and_no_solution() -> None:
    candidate, reference = "new", "old"
    good = SafetyTest(limit=0.0).run(COSTS)
    assert good.passed
    assert good.verdict == "PASS"
    assert good.upper == pytest.approx(-0.772350, abs=1e-6)
    assert good.select(candidate, reference) == candidate
    bad = SafetyTest(limit=-1.0).run(COSTS)
    assert bad.mean < bad.limit < bad.upper  # the mean alone would have passed
    assert bad.verdict == "NO_SOLUTION"
    assert bad.select(candidate, reference) == reference
    assert SafetyTest(limit=0.0, method="hoeffding", lower=-5, upper=5).run(COSTS).verdict == "NO_SOLUTION"


@one_positive
def test_it_can_be_looked_at_once() -> None:
    test = SafetyTest(limit=0.0)
    test.run(COSTS)
    with pytest.raises(UsageError, match="second look voids the guarantee"):
        test.run(COSTS)


@one_positive
def test_planned_looks_share_the_confidence() -> None:
    test = SafetyTest(limit=0.0, confidence=0.9, looks=2)
    assert test.run(COSTS).upper == pytest.approx(-0.600635, abs=1e-6)  # delta 0.05 each
    test.run(COSTS)
    with pytest.raises(UsageError):
        test.run(COSTS)


@one_positive
def test_a_refused_call_uses_up_no_look() -> None:
    test = SafetyTest(limit=0.0)
    with pytest.raises(UsageError, match="1 test items were also used in training"):
        test.run(COSTS, test_ids=range(10), training_ids=range(9, 20))
    with pytest.raises(UsageError, match="no costs"):
        test.run([])
    assert test.run(COSTS, test_ids=range(10), training_ids=range(10, 20)).passed


def test_doubtful_student_t_tests_warn() -> None:
    rare = np.zeros(100)
    rare[:2] = 10
    with pytest.warns(UserWarning, match="skewed"), pytest.warns(UserWarning, match="only 2 costs"):
        result = SafetyTest(limit=1.0).run(rare)
    assert len(result.warnings) == 2
    # Costs centred on 0: none harmful was seen, so nothing is known of how harmful one is.
    with pytest.warns(UserWarning, match="only 0 costs are positive"):
        SafetyTest(limit=0.0).run(np.random.default_rng(0).normal(-10, 1, size=200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SafetyTest(limit=1.0, method="empirical_bernstein", lower=0, upper=10).run(rare)
        SafetyTest(limit=1.0).run(np.random.default_rng(0).normal(size=200))
