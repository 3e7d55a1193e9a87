"""Estimators, constraints, sets of them, scalarisation and budgets."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferl.constraints import (
    METHODS,
    AdditiveMultiplier,
    BatchEstimator,
    Constraint,
    ConstraintSet,
    CostBudget,
    EMAEstimator,
    Estimator,
    LogMultiplier,
    UpperBoundEstimator,
    WindowEstimator,
    discounted_limit,
    scalarise,
    upper_bound,
)
from saferl.constraints.bounds import Method
from saferl.errors import UsageError

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "batch": BatchEstimator,
    "window": lambda: WindowEstimator(5),
    "ema": lambda: EMAEstimator(0.9),
    "upper": lambda: UpperBoundEstimator(WindowEstimator(8), 0.9, test_size=50),
    "upper-ema": lambda: UpperBoundEstimator(EMAEstimator(0.5), 0.9, c1=4),
    "upper-range": lambda: UpperBoundEstimator(
        WindowEstimator(8), 0.9, "empirical_bernstein", lower=-1e6, upper=1e6
    ),
    "upper-bootstrap": lambda: UpperBoundEstimator(BatchEstimator(), 0.9, "bootstrap"),
}


# --- estimators --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_seen_is_none_and_an_empty_batch_changes_nothing(name: str) -> None:
    estimator = ESTIMATORS[name]()
    assert estimator.estimate() is None
    estimator.update([1.0, 2.0, 4.0])
    before = estimator.estimate()
    estimator.update([])
    estimator.update(np.zeros(3), mask=np.zeros(3, bool))
    assert estimator.estimate() == before


@pytest.mark.parametrize(
    "make",
    [list, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16, requires_grad=True)],
)
def test_any_array_will_do(make: Callable) -> None:
    estimator = BatchEstimator()
    estimator.update(make([1.0, 2.0, 6.0]), mask=make([1.0, 0.0, 1.0]))
    estimate = estimator.estimate()
    assert estimate is not None
    assert (estimate.mean, estimate.count, estimate.value) == (3.5, 2, 3.5)
    assert estimate.std == pytest.approx(np.std([1, 6], ddof=1))


def test_window_keeps_the_last_costs() -> None:
    estimator = WindowEstimator(3)
    estimator.update([1, 2])
    estimator.update([3, 4, 5, 6])
    assert estimator.estimate().mean == 5  # type: ignore[union-attr]


def test_ema_by_hand() -> None:
    estimator = EMAEstimator(0.9)
    estimator.update([10.0])
    assert estimator.estimate().mean == 10  # type: ignore[union-attr]
    estimator.update([20.0, 40.0])
    estimate = estimator.estimate()
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.9 * 10 + 0.1 * 30)
    # Weights 0.9, 0.05, 0.05: an effective 1.2 costs, of which one has no spread.
    assert (estimate.std, estimate.count) == (0.0, 1)
    estimator.update([30.0] * 6)
    estimate = estimator.estimate()
    assert estimate is not None
    squares = 0.81**2 + 2 * 0.045**2 + 6 * (0.1 / 6) ** 2
    assert estimate.count == int(1 / squares)


def test_ema_without_memory_is_the_last_batch() -> None:
    """Mean, sample deviation and count; the effective count is the true one for any batch size."""
    for n in range(1, 130):
        costs = np.random.default_rng(n).normal(3.0, 2.0, n)
        ema, batch = EMAEstimator(0.0), BatchEstimator()
        for estimator in (ema, batch):
            estimator.update([99.0])
            estimator.update(costs)
        one, two = ema.estimate(), batch.estimate()
        assert one is not None
        assert two is not None
        assert one.count == two.count == n
        assert (one.mean, one.std) == pytest.approx((two.mean, two.std))


def test_ema_never_rests_on_more_costs_than_its_memory_holds() -> None:
    estimator = EMAEstimator(0.9)
    for _ in range(1000):
        estimator.update(np.zeros(10))
    assert estimator.estimate().count == 190  # type: ignore[union-attr]  # 10 (1 + 0.9) / (1 - 0.9)


def test_kappa_numbers() -> None:
    bound = UpperBoundEstimator(WindowEstimator(256), 0.9, c1=4, c2=2, test_size=100)
    assert bound.kappa(256) == pytest.approx(0.579252, abs=1e-6)
    assert bound.kappa(32) == pytest.approx(1.183963, abs=1e-6)


def test_upper_bound_estimate_by_hand() -> None:
    costs = [-2, -1, 0, -3, 1, -2, -1.5, -0.5, -2.5, -1.5]
    estimator = UpperBoundEstimator(BatchEstimator(), 0.9)
    estimator.update(costs)
    estimate = estimator.estimate()
    assert estimate is not None
    assert (estimate.mean, estimate.std) == pytest.approx((-1.3, 1.206464), abs=1e-6)
    assert estimate.value == pytest.approx(-0.772350, abs=1e-6)
    single = UpperBoundEstimator(BatchEstimator(), 0.9)
    single.update([1.0])
    assert single.estimate() is None


@given(st.integers(2, 500), st.floats(0.5, 0.98), st.floats(0, 10), st.floats(0, 10))
def test_a_bound_grows_with_spread_and_confidence_and_shrinks_with_costs(
    n: int, confidence: float, low: float, gap: float
) -> None:
    def bound(confidence: float) -> UpperBoundEstimator:
        return UpperBoundEstimator(BatchEstimator(), confidence, c1=4, c2=2, test_size=100)

    kappa = bound(confidence).kappa(n)
    assert bound(confidence).kappa(n + 1) <= kappa <= bound(confidence + 0.01).kappa(n)
    values = []
    for spread in (low, low + gap):
        estimator = bound(confidence)
        estimator.update([5 - spread, 5 + spread])
        values.append(estimator.estimate().value)  # type: ignore[union-attr]
    assert 5 - 1e-9 <= values[0] <= values[1] + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_an_upper_bound_estimate_is_the_bound_of_that_method(method: Method) -> None:
    window = WindowEstimator(30)
    estimator = UpperBoundEstimator(window, 0.95, method, lower=0, upper=1)
    stream = np.random.default_rng(0).integers(2, size=70).astype(float)
    estimator.update(stream[:40])
    estimator.update(stream[40:])
    estimate = estimator.estimate()
    assert estimate is not None
    assert estimate.mean == stream[-30:].mean()
    assert estimate.value == pytest.approx(float(upper_bound(stream[-30:], 0.95, method, 0, 1)))


@pytest.mark.parametrize("name", ESTIMATORS)
@settings(max_examples=50, deadline=None)
@given(past=st.lists(st.floats(-1e6, 1e6), max_size=12), future=st.lists(st.floats(-1e6, 1e6), max_size=12))
def test_estimators_round_trip_through_json(name: str, past: list[float], future: list[float]) -> None:
    estimator, copy = ESTIMATORS[name](), ESTIMATORS[name]()
    estimator.update(past)
    copy.load_state_dict(json.loads(json.dumps(estimator.state_dict())))
    estimator.update(future)
    copy.update(future)
    assert copy.estimate() == estimator.estimate()


@pytest.mark.parametrize("bad", [[[1.0]], [float("nan")], 3.0])
def test_bad_costs_are_refused(bad: object) -> None:
    with pytest.raises(UsageError):
        BatchEstimator().update(bad)


def test_bad_settings_are_refused() -> None:
    for make in (
        lambda: WindowEstimator(0),
        lambda: EMAEstimator(1.0),
        lambda: UpperBoundEstimator(BatchEstimator(), 1.0),
        lambda: UpperBoundEstimator(BatchEstimator(), 0.9, "students"),  # type: ignore[arg-type]
        lambda: UpperBoundEstimator(BatchEstimator(), 0.9, "hoeffding"),
        lambda: UpperBoundEstimator(EMAEstimator(0.9), 0.9, "bootstrap"),
        lambda: UpperBoundEstimator(BatchEstimator(), 0.9, "bootstrap", c1=4),
        lambda: UpperBoundEstimator(BatchEstimator(), 0.9, c1=-1),
        lambda: UpperBoundEstimator(BatchEstimator(), 0.9, test_size=1),
        lambda: BatchEstimator().update([1.0], mask=[True, False]),
    ):
        with pytest.raises(UsageError):
            make()


# --- constraints -------------------------------------------------------------------------------------


def sgd(lr: float = 0.1, init: float = 0.0) -> AdditiveMultiplier:
    return AdditiveMultiplier(lr=lr, init=init, optimizer="sgd")


def test_a_constraint_joins_its_parts() -> None:
    constraint = Constraint("cost", 25.0, estimator=WindowEstimator(4), multiplier=sgd())
    assert constraint.update() == 0.0  # nothing was ever observed
    assert constraint.violation == 0.0
    constraint.observe([30.0, 40.0])
    assert constraint.violation == 10.0
    assert constraint.update() == pytest.approx(1.0)
    constraint.observe([])  # no episode finished: the last estimate counts
    assert constraint.update() == pytest.approx(2.0)
    assert constraint.metrics() == pytest.approx(
        {
            "constraint/cost/mean": 35.0,
            "constraint/cost/std": np.std([30, 40], ddof=1),
            "constraint/cost/limit": 25.0,
            "constraint/cost/violation": 10.0,
            "constraint/cost/multiplier": 2.0,
        }
    )


def test_a_constraint_on_an_upper_bound_logs_it() -> None:
    constraint = Constraint("cost", 3.0, estimator=UpperBoundEstimator(BatchEstimator()), multiplier=sgd())
    constraint.observe([1.0, 3.0, 5.0])
    metrics = constraint.metrics()
    assert metrics["constraint/cost/mean"] == 3.0
    assert metrics["constraint/cost/bound"] > 3.0
    assert metrics["constraint/cost/violation"] == metrics["constraint/cost/bound"] - 3.0
    assert constraint.update() > 0  # the mean alone would have left it at 0
    constraint.observe([3.0, 3.0])
    assert constraint.metrics()["constraint/cost/bound"] == 3.0


def test_warm_up_leaves_the_multiplier() -> None:
    constraint = Constraint("cost", 0.0, multiplier=sgd(), warmup_updates=2)
    constraint.observe([1.0])
    assert [constraint.update() for _ in range(4)] == pytest.approx([0, 0, 0.1, 0.2])


def test_a_negative_limit_is_a_limit() -> None:
    """Safe RLHF's cost models centre on 0, so limits such as -3 are usual."""
    constraint = Constraint("harm", -3.0, multiplier=LogMultiplier())
    constraint.observe([-2.0])
    assert constraint.violation == 1.0
    assert constraint.update() == pytest.approx(np.exp(0.1))


def test_control_and_language_see_one_sequence_of_multipliers() -> None:
    """The same stream of costs, once as NumPy episode costs and once as torch response scores."""
    stream = np.random.default_rng(0).normal(1.0, 3.0, (40, 16))
    answers = []
    for convert in (np.asarray, torch.from_numpy):
        constraint = Constraint(
            "cost", 0.0, estimator=WindowEstimator(128), multiplier=LogMultiplier(maximum=5)
        )
        answers.append([(constraint.observe(convert(batch)), constraint.update())[1] for batch in stream])
    assert answers[0] == answers[1]


def test_a_set_moves_only_what_is_violated_and_round_trips() -> None:
    def make() -> ConstraintSet:
        return ConstraintSet(
            [Constraint("a", 1.0, multiplier=sgd(init=0.5)), Constraint("b", 1.0, multiplier=sgd(init=0.5))]
        )

    constraints = make()
    constraints.observe({"a": [3.0], "b": [0.0]})
    assert constraints.update() == pytest.approx({"a": 0.7, "b": 0.4})
    assert constraints.multipliers == pytest.approx({"a": 0.7, "b": 0.4})
    assert constraints.limits == {"a": 1.0, "b": 1.0}
    assert constraints.names == ("a", "b")
    assert len(constraints) == 2
    assert constraints["a"].value == pytest.approx(0.7)
    copy = make()
    copy.load_state_dict(json.loads(json.dumps(constraints.state_dict())))
    assert copy.update() == constraints.update()


def test_names_are_checked() -> None:
    constraints = ConstraintSet([Constraint("hazards", 1.0), Constraint("vases", 1.0)])
    with pytest.raises(UsageError, match="did you mean 'hazards'"):
        constraints.observe({"hazard": [1.0], "vases": [1.0]})
    with pytest.raises(UsageError, match="no costs were given for the constraint 'vases'"):
        constraints.observe({"hazards": [1.0]})
    with pytest.raises(UsageError, match="two constraints are named"):
        ConstraintSet([Constraint("a", 1.0), Constraint("a", 2.0)])
    with pytest.raises(UsageError, match="stored constraints"):
        constraints.load_state_dict({})
    with pytest.raises(UsageError, match="finite"):
        Constraint("a", float("nan"))


# --- scalarise ---------------------------------------------------------------------------------------

arrays = st.lists(st.floats(-100, 100), min_size=4, max_size=4).map(np.array)


def test_scalarise_numbers() -> None:
    assert scalarise(1.0, {"c": 0.5}, {"c": 2.0}) == 0
    assert scalarise(2.0, {"c": 1.0}, {"c": 0.5}) == 1
    for multiplier, expected in ((0.0, 2.0), (1.0, 0.6), (5.0, -1 / 3)):
        assert scalarise(2.0, {"c": 0.8}, {"c": multiplier}) == pytest.approx(expected)
    assert scalarise(2.0, {"c": 0.8}, {"c": 1e12}) == pytest.approx(-0.8)
    assert scalarise(1.0, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}) == pytest.approx(-1.0)
    assert scalarise(3.0, {"c": 1.0}, {"c": 2.0}, norm="none") == 1.0
    assert scalarise(3.0, {"c": 1.0}, {"c": 0.25}, norm="convex") == pytest.approx(0.75 * 3 - 0.25)


@given(arrays, arrays)
def test_a_zero_multiplier_gives_the_advantages_unchanged(a: np.ndarray, c: np.ndarray) -> None:
    for norm in ("none", "sum", "convex"):
        np.testing.assert_array_equal(scalarise(a, {"c": c}, {"c": 0.0}, norm), a)  # type: ignore[arg-type]
        np.testing.assert_array_equal(scalarise(a, {}, {}, norm), a)  # type: ignore[arg-type]


@given(arrays, arrays)
def test_a_huge_multiplier_leaves_the_cost_alone_and_overflows_nowhere(a: np.ndarray, c: np.ndarray) -> None:
    for lam in (1e9, 1e300):
        np.testing.assert_allclose(scalarise(a, {"c": c}, {"c": lam}), -c, atol=1e-6)
        single = scalarise(torch.from_numpy(a).float(), {"c": torch.from_numpy(c).float()}, {"c": lam})
        np.testing.assert_allclose(single.numpy(), -c, atol=1e-4)


@given(arrays, arrays, st.floats(0, 1), st.floats(-5, 5), st.floats(-5, 5))
def test_shifts_vanish_after_centring(a: np.ndarray, c: np.ndarray, lam: float, x: float, y: float) -> None:
    for norm in ("none", "sum", "convex"):
        one = scalarise(a, {"c": c}, {"c": lam}, norm)  # type: ignore[arg-type]
        two = scalarise(a + x, {"c": c + y}, {"c": lam}, norm)  # type: ignore[arg-type]
        np.testing.assert_allclose(one - one.mean(), two - two.mean(), atol=1e-9)


@pytest.mark.parametrize(("lam", "expected"), [(0, 0.97), (0.5, 0.47), (4, -0.23)])
def test_the_kl_weight_does_not_depend_on_the_multiplier(lam: float, expected: float) -> None:
    """((r - k kl) - lam (c + k kl)) / (1 + lam) = (r - lam c) / (1 + lam) - k kl."""
    r, c, k, kl = 1.0, 0.5, 0.01, 3.0
    split = scalarise(r - k * kl, {"c": c + k * kl}, {"c": lam})
    assert split == pytest.approx(scalarise(r, {"c": c}, {"c": lam}) - k * kl)
    assert split == pytest.approx(expected)


def test_scalarise_agrees_on_torch_and_numpy_and_keeps_the_dtype() -> None:
    a, c = torch.randn(7), torch.randn(7)
    got = scalarise(a, {"c": c}, {"c": 0.7})
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), scalarise(a.numpy(), {"c": c.numpy()}, {"c": 0.7}), rtol=1e-6)


def test_scalarise_refuses_broadcasts_and_wrong_names() -> None:
    a = np.zeros(4)
    for costs, multipliers, norm in (
        ({"c": np.zeros((4, 1))}, {"c": 1.0}, "sum"),
        ({"c": a}, {"d": 1.0}, "sum"),
        ({"c": a}, {"c": -1.0}, "sum"),
        ({"c": a}, {"c": float("nan")}, "sum"),
        ({"c": a}, {"c": float("inf")}, "sum"),
        ({"c": a}, {"c": 1.5}, "convex"),
        ({"c": a}, {"c": 0.5}, "other"),
    ):
        with pytest.raises(UsageError):
            scalarise(a, costs, multipliers, norm)  # type: ignore[arg-type]


# --- budgets -----------------------------------------------------------------------------------------


def test_discounted_limit_number() -> None:
    assert discounted_limit(25, 0.999, 1000) == pytest.approx(15.8076, abs=5e-5)
    assert discounted_limit(25, 1.0, 1000) == 25
    assert discounted_limit(25, 1 - 1e-9, 1000) == pytest.approx(25, rel=1e-5)


@pytest.mark.parametrize("convert", [np.array, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_saute_numbers(convert: Callable) -> None:
    budget = CostBudget(25, 0.999, 1000)
    z, seen = convert([1.0]), []
    for cost in (0.0, 1.0, 1.0, 0.0, 5.0):
        z = budget.spend(z, convert([cost]))
        seen.append(float(z[0]))
    assert seen == pytest.approx([1.001001, 0.938679, 0.876295, 0.877172, 0.561430], abs=1e-6)
    z = convert([1.0])
    for step in range(1, 17):
        assert float(z[0]) > 0, step
        z = budget.spend(z, convert([1.0]))
    assert float(z[0]) <= 0


@given(st.floats(0.01, 2), st.floats(0, 1), st.floats(0.5, 0.999))
def test_the_budget_falls_exactly_when_the_cost_exceeds_its_interest(
    z: float, cost: float, discount: float
) -> None:
    budget = CostBudget(5.0, discount, 100)
    after = float(budget.spend(np.array([z]), np.array([cost]))[0])
    interest = budget.allowance * (1 - discount) * z
    if cost >= interest + 1e-9:
        assert after <= z
    if cost <= interest - 1e-9:
        assert after >= z


@given(st.lists(st.floats(0, 3), min_size=1, max_size=20))
def test_without_discount_the_budget_is_what_is_left(costs: list[float]) -> None:
    budget = CostBudget(7.0, 1.0, 20)
    z = np.array([1.0])
    for cost in costs:
        z = budget.spend(z, np.array([cost]))
    assert z[0] == pytest.approx(1 - sum(costs) / 7.0, abs=1e-9)


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_rewards_and_restarts_by_row(convert: Callable) -> None:
    budget = CostBudget(10.0, 1.0, 20)
    z = convert([0.5, 0.0, -0.2])
    assert budget.reward(convert([1.0, 2.0, 3.0]), z, unsafe_reward=-0.25).tolist() == [1.0, -0.25, -0.25]
    ended = convert([False, True, False])
    assert budget.restart(z, ended).tolist() == pytest.approx([0.5, 1.0, -0.2])
    assert budget.restart(z, ended, start=0.4).tolist() == pytest.approx([0.5, 0.4, -0.2])
    assert z.tolist() == pytest.approx([0.5, 0.0, -0.2])  # the final observation's budget is untouched


def test_impossible_budgets_are_refused() -> None:
    for limit, discount, horizon in ((0, 0.99, 10), (1, 0, 10), (1, 1.1, 10), (1, 0.9, 0)):
        with pytest.raises(UsageError):
            CostBudget(limit, discount, horizon)
