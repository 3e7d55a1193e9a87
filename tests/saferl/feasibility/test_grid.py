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
    solve_on_grid,
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


def test_a_grid_over_continuous_states_is_the_table_where_steps_end_on_points() -> None:
    following, safe, _ = corridor()

    def advance(states: np.ndarray, action: np.ndarray) -> np.ndarray:
        index = (6 * states[:, 0] + states[:, 1]).astype(int)
        moved = following[index, int(action[0]) + 1]
        return np.stack([POSITION[moved], SPEED[moved]], axis=1).astype(float)

    def signal(states: np.ndarray) -> np.ndarray:
        return np.where(states[:, 0] < 20, -1.0, 25.0)

    for discount in (0.99, 1.0):
        found = solve_on_grid(
            [np.arange(21), np.arange(6)],
            advance,
            [[-1], [0], [1]],
            signal,
            discount=discount,
            tolerance=1e-12,
        )
        expected, _ = exact_safety_values(following, np.where(safe, -1.0, 25.0), discount)
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-9)


def test_braking_before_a_wall() -> None:
    """x' = x + v dt, v' = v + u dt, u in [-1, 1]: stoppable before x = 0 if and only if x + v^2 / 2 <= 0."""
    dt = 0.02
    axes = [np.linspace(-1.5, 0.5, 201), np.linspace(0, 1.5, 151)]

    def advance(states: np.ndarray, action: np.ndarray) -> np.ndarray:
        x, v = states.T
        return np.stack([x + v * dt, np.maximum(v + action[0] * dt, 0)], axis=1)

    values = solve_on_grid(axes, advance, [[-1], [1]], lambda s: s[:, 0])
    x, v = np.meshgrid(*axes, indexing="ij")
    peak = x + v**2 / 2
    clear = (np.abs(peak) > 0.03) & (peak < 0.45)
    assert ((values <= 0) == (peak <= 0))[clear].mean() > 0.999
    assert np.abs(values - peak)[clear & (v > 0.1)].max() < 0.05


def test_loops_and_ends() -> None:
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    hand = lambda s: -np.cos(s[:, 0])  # noqa: E731  # positive on the left half
    turn = lambda s, u: s + u[0]  # noqa: E731
    assert (solve_on_grid([angle], turn, [[np.pi / 20]], hand, periodic=[0]) > 0.9).all()
    stay = solve_on_grid([angle], turn, [[np.pi / 20], [0]], hand, periodic=[0])
    np.testing.assert_allclose(stay, -np.cos(angle), atol=1e-6)
    over = solve_on_grid(
        [angle], turn, [[np.pi / 20]], hand, periodic=[0], ended=lambda s: s[:, 0] > np.pi / 4
    )
    np.testing.assert_allclose(
        over[angle < np.pi / 4 - 0.2], -np.cos(angle)[angle < np.pi / 4 - 0.2], atol=0.3
    )
    assert (over[angle < np.pi / 4 - 0.2] < 0).all()


def test_impossible_grids() -> None:
    call = lambda axis, **k: solve_on_grid([axis], lambda s, u: s, [[0]], lambda s: s[:, 0], **k)  # noqa: E731
    with pytest.raises(ValueError, match="evenly"):
        call([0, 1, 3])
    with pytest.raises(ValueError, match="discount"):
        call([0, 1], discount=1.5)
    with pytest.raises(RuntimeError, match="sweeps"):
        solve_on_grid([np.arange(9)], lambda s, u: s + 1, [[0]], lambda s: s[:, 0], max_sweeps=2)
