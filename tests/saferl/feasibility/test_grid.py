"""Exact regions against a corridor solved by hand, brute force and the optimality of expectiles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saferl.feasibility import (
    exact_safety_values,
    expectile,
    expectile_safety_values,
    largest_feasible_region,
)

X, V = np.meshgrid(np.arange(21), np.arange(6), indexing="ij")
POSITION, SPEED = X.ravel(), V.ravel()


def corridor() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cart with speed 0 to 5 in a corridor whose end, x = 20, is a wall: next states, safe, feasible."""
    speed = np.clip(SPEED[:, None] + np.array([-1, 0, 1]), 0, 5)
    position = np.minimum(POSITION[:, None] + speed, 20)
    position[POSITION == 20] = 20
    safe = POSITION < 20
    return 6 * position + speed, safe, safe & (POSITION + SPEED * (SPEED - 1) / 2 <= 19)


def at(values: np.ndarray, x: int, v: int) -> float:
    return float(values[6 * x + v])


def test_the_corridor() -> None:
    following, safe, feasible = corridor()
    assert (feasible.sum(), (safe & ~feasible).sum(), (~safe).sum()) == (100, 20, 6)
    np.testing.assert_array_equal(largest_feasible_region(following, safe), feasible)
    values, q = exact_safety_values(following, np.where(safe, -1.0, 25.0), 0.99)
    np.testing.assert_allclose(values[feasible], -1, atol=1e-9)
    assert (values[~feasible] > 0).all()
    expected = {(18, 3): 24.74, (15, 4): 24.4826, (10, 5): 23.975496, (9, 5): -1, (19, 1): -1}
    for (x, v), value in expected.items():
        assert at(values, x, v) == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(q.min(1), values)


@pytest.mark.parametrize(
    ("violation", "wrong"),
    [
        (25.0, {0.5: 100, 0.7: 100, 0.9: 100, 0.99: 23, 0.999: 6}),
        (1.0, {0.5: 100, 0.7: 100, 0.9: 39, 0.99: 0, 0.999: 0}),
    ],
)
def test_how_many_feasible_states_the_expectile_gives_up(violation: float, wrong: dict[float, int]) -> None:
    following, safe, feasible = corridor()
    for level, number in wrong.items():
        values, _ = expectile_safety_values(following, np.where(safe, -1, violation), 0.99, level)
        assert (values[feasible] > 0).sum() == number
        assert (values[~feasible] > 0).all()  # never the dangerous error


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 3))
def test_regions_and_values_against_brute_force(seed: int, states: int, actions: int) -> None:
    rng = np.random.default_rng(seed)
    following = rng.integers(0, states, (states, actions))
    signals = rng.normal(size=states)
    best = np.full(states, np.inf)
    for policy in itertools.product(range(actions), repeat=states):
        worst, at_state = signals.copy(), np.arange(states)
        for _ in range(states):
            at_state = following[at_state, np.array(policy)[at_state]]
            worst = np.maximum(worst, signals[at_state])
        best = np.minimum(best, worst)
    values, _ = exact_safety_values(following, signals, 1.0)
    np.testing.assert_allclose(values, best)
    np.testing.assert_array_equal(largest_feasible_region(following, signals <= 0), best <= 0)


@given(st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_expectiles_balance_what_lies_above_and_below(seed: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    values, p = rng.normal(size=(4, 5)).round(1), rng.dirichlet(np.ones(5), 4)
    m = expectile(values, level, p)
    above = (p * np.maximum(values - m[:, None], 0)).sum(1)
    below = (p * np.maximum(m[:, None] - values, 0)).sum(1)
    np.testing.assert_allclose(level * above, (1 - level) * below, atol=1e-9)


def test_expectiles_by_hand() -> None:
    half = [0.5, 0.5]
    for level, value in ((0.5, 12.0), (0.7, 6.8), (0.9, 1.6), (0.99, -0.74), (0.999, -0.974)):
        assert expectile([[-1.0, 25.0]], 1 - level, half)[0] == pytest.approx(value)
    assert expectile([[3.0, 3.0, 3.0]], 0.2, [0.2, 0.3, 0.5])[0] == pytest.approx(3)
    p = 2.5 / 3.4  # the share of safe actions from which a state counts as feasible at 0.9
    assert expectile([[-1.0, 25.0]], 0.1, [p, 1 - p])[0] == pytest.approx(0, abs=1e-12)


def test_impossible_input() -> None:
    with pytest.raises(ValueError, match="outside 0 to 1"):
        exact_safety_values([[0], [2]], [0, 0], 0.9)
    with pytest.raises(ValueError, match="discount"):
        exact_safety_values([[0], [1]], [0, 0], 0)
    with pytest.raises(ValueError, match="expectile"):
        expectile_safety_values([[0], [1]], [0, 0], 0.9, 1.0)
    with pytest.raises(ValueError, match="one a state"):
        exact_safety_values([[0], [1]], [0, 0, 0], 0.9)
    with pytest.raises(ValueError, match="one a state"):
        largest_feasible_region([[0], [1]], [True])
