"""Gates: thresholds, the four combinations, the lexicographic guarantee, NumPy and torch alike."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from saferl.errors import UsageError
from saferl.gates import (
    Gate,
    accumulate,
    gated_sum,
    lexicographic,
    lexicographic_weights,
    multiply,
    switch,
    terminate,
)

KINDS: list[Any] = [np.array, lambda values: torch.tensor(np.array(values))]


@pytest.mark.parametrize("kind", KINDS, ids=["numpy", "torch"])
def test_thresholds(kind: Any) -> None:
    signal = kind([-1.0, 0.0, 1.0])
    for gate, expected in (
        (Gate(0.0), [0, 0, 1]),
        (Gate(0.0, strict=False), [0, 1, 1]),
        (Gate(-math.inf), [1, 1, 1]),
        (Gate(math.inf), [0, 0, 0]),
        (Gate(math.inf, sharpness=2.0), [0, 0, 0]),
        (Gate(0.0, sharpness=2.0), [0.11920292, 0.5, 0.88079708]),
    ):
        opened = gate(signal)
        assert type(opened) is type(signal)
        np.testing.assert_allclose(opened, expected, atol=1e-8)
    np.testing.assert_array_equal(Gate(0.0)(kind([math.nan])), [0])


def test_kinds_of_numbers_are_kept() -> None:
    assert Gate()(torch.tensor([1.0], dtype=torch.float64)).dtype == torch.float64
    assert Gate()(torch.tensor([1])).dtype == torch.float32
    assert Gate()(np.array([1.0], np.float32)).dtype == np.float32
    assert Gate()(np.array([True])).dtype == np.float64
    signal = torch.tensor([0.3], requires_grad=True)
    Gate(sharpness=4.0)(signal).sum().backward()
    assert signal.grad is not None
    assert signal.grad.item() > 0


@pytest.mark.parametrize("kind", KINDS, ids=["numpy", "torch"])
def test_accumulation(kind: Any) -> None:
    outcome, step = kind([-1.0, 0.0, 1.0]), kind([2.0, 2.0, 2.0])
    for threshold, expected in ((0.0, [-1, 0, 3]), (-1.0, [-1, 2, 3]), (-math.inf, [1, 2, 3])):
        total, _ = accumulate([outcome, step], [Gate(threshold)])
        np.testing.assert_allclose(total, expected)
    total, (opened,) = accumulate([outcome, step], [Gate(math.inf)])
    np.testing.assert_allclose(total, outcome)
    np.testing.assert_allclose(opened, 0)


@pytest.mark.parametrize("kind", KINDS, ids=["numpy", "torch"])
def test_a_shut_gate_shuts_all_below(kind: Any) -> None:
    outcome, style, length = kind([1.0, 1.0, -1.0]), kind([1.0, -1.0, 1.0]), kind([0.5, 0.5, 0.5])
    total, opened = accumulate([outcome, style, length], [Gate(0.0), Gate(0.0)])
    np.testing.assert_allclose(total, [2.5, 0.0, -1.0])
    np.testing.assert_allclose(opened[0], [1, 1, 0])
    np.testing.assert_allclose(opened[1], [1, 0, 0])


@pytest.mark.parametrize("kind", KINDS, ids=["numpy", "torch"])
def test_a_gated_sum_ignores_what_is_shut(kind: Any) -> None:
    found = gated_sum(kind([0.0, 1.0]), kind([math.nan, -0.25]), kind([0.0, 1.0]))
    np.testing.assert_allclose(found, [0.0, 0.75])
    total, _ = accumulate([kind([-1.0, 1.0]), kind([math.inf, 2.0])], [Gate()])
    np.testing.assert_allclose(total, [-1.0, 3.0])


def test_a_gate_for_each_group_of_rows() -> None:
    # Groups of four rows; only the group that is right throughout pays for length.
    right = np.array([[1.0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    length = -np.full((3, 4), 0.25)
    opened = Gate(0.9)(right.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(gated_sum(right, length, opened * right), [[0.75] * 4, [1, 0, 1, 0], [0] * 4])


@pytest.mark.parametrize("kind", KINDS, ids=["numpy", "torch"])
def test_soft_penalties_multiply(kind: Any) -> None:
    found = multiply(kind([2.0, 4.0]), kind([0.5, 1.0]), kind([1.0, 0.25]))
    np.testing.assert_allclose(found, [1.0, 1.0])
    with pytest.raises(UsageError, match=r"factor 1 spans 0 to 1\.5"):
        multiply(kind([1.0]), kind([1.0]), kind([0.0, 1.5]))


@pytest.mark.parametrize("kind", KINDS, ids=["numpy", "torch"])
def test_hard_infractions_end(kind: Any) -> None:
    rewards = kind([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    hard = kind([[False, True, False, True], [False] * 4, [True, True, False, False]])
    kept, first = terminate(rewards, hard, penalty=-1.0)
    np.testing.assert_allclose(kept, [[1, 1, 0, 0], [1, 1, 1, 1], [4, 0, 0, 0]])
    np.testing.assert_array_equal(first, [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    dropped, _ = terminate(rewards, hard, keep_last=False)
    np.testing.assert_allclose(dropped, [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    spoilt, _ = terminate(kind([1.0, 2.0, math.inf]), kind([True, False, False]), penalty=kind([-1.0, 0, 0]))
    np.testing.assert_allclose(spoilt, [0, 0, 0])
    with pytest.raises(UsageError, match="must be equal"):
        terminate(rewards, hard[:2])


@pytest.mark.parametrize("kind", KINDS, ids=["numpy", "torch"])
def test_switching(kind: Any) -> None:
    found = switch(kind([True, False]), kind([1.0, 1.0]), kind([2.0, 2.0]))
    np.testing.assert_allclose(found, [1.0, 2.0])
    np.testing.assert_allclose(switch(kind([[True], [False]]), kind([1.0, 3.0]), 0.0), [[1, 3], [0, 0]])
    with pytest.raises(UsageError, match="must be a Boolean array"):
        switch(Gate()(kind([1.0, -1.0])), 1.0, 0.0)


def test_the_lexicographic_guarantee_by_enumeration() -> None:
    # Outcomes 0 and 1, inner rewards in [-0.4, 0.9] that only those that pass earn.
    inner = np.linspace(-0.4, 0.9, 14)
    assert lexicographic((-0.4, 0.9), (0, 0), 1.0)
    passing, _ = accumulate([np.ones(14), inner], [Gate(0.5)])
    failing, _ = accumulate([np.zeros(14), inner], [Gate(0.5)])
    assert passing.min() > failing.max()
    # Without the gate the same inner rewards overturn the order; with too large ones even the gate does.
    assert not lexicographic((-0.4, 0.9), (-0.4, 0.9), 1.0)
    assert (1 + inner).min() < (0 + inner).max()
    assert not lexicographic((-1.2, 0.9), (0, 0), 1.0)
    assert 1 - 1.2 < 0


@pytest.mark.parametrize("width", [0.5, 0.99, 1.0, 7.5])
@pytest.mark.parametrize("threshold", [-2.0, -1.0, 0.0])
def test_neighbouring_outcomes_by_enumeration(width: float, threshold: float) -> None:
    # Outcomes -1, 0 and 1: all, the upper two, or the highest alone count an inner reward up to width.
    outcomes, inner = np.array([-1.0, 0.0, 1.0]), np.linspace(0.0, width, 5)
    totals, _ = accumulate([outcomes[:, None], inner], [Gate(threshold)])
    ranges = [(0.0, width) if outcome > threshold else (0.0, 0.0) for outcome in outcomes]
    for k in range(2):
        ordered = bool((totals[k].max() < totals[k + 1].min()).all())
        assert lexicographic(ranges[k + 1], ranges[k], 1.0) == ordered
    everywhere = all(lexicographic(ranges[k + 1], ranges[k], 1.0) for k in range(2))
    assert everywhere == (width < 1 or threshold == 0)


def test_weights_that_order_without_gates() -> None:
    levels = [np.array([-1.0, 0, 1]), np.array([0.0, 0.5, 2]), np.array([0.0, 1, 5])]
    weights = lexicographic_weights([2.0, 2.0, 5.0], [1.0, 0.5])
    assert weights[-1] == 1
    rows = list(itertools.product(*levels))
    sums = [sum(w * x for w, x in zip(weights, row, strict=True)) for row in rows]
    assert sorted(rows) == [row for _, row in sorted(zip(sums, rows, strict=True))]
    small = [w * 0.5 if k == 0 else w for k, w in enumerate(weights)]
    wrong = [sum(w * x for w, x in zip(small, row, strict=True)) for row in rows]
    assert sorted(rows) != [row for _, row in sorted(zip(wrong, rows, strict=True))]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Gate(math.nan), "not a number"),
        (lambda: Gate(sharpness=0.0), "must be positive"),
        (lambda: accumulate([], []), "0 levels need 0 gates"),
        (lambda: accumulate([np.ones(1)], [Gate()]), "1 levels need 0 gates"),
        (lambda: lexicographic_weights([1.0, 1.0], []), "need 1 gaps"),
        (lambda: lexicographic_weights([1.0, 0.0], [1.0]), "positive and finite"),
    ],
)
def test_impossible_gates(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make()
