"""G-RA: worked totals, several levels, gates by whole episodes, dead groups, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from saferl.errors import UsageError
from saferl.gates import Gate
from saferl.rewards.gated_accumulation import GatedAccumulator, dead_groups
from saferl.rewards.par import par_reward


def rewards(kind: Any = np.array) -> dict[str, Any]:
    """Three episodes of two turns, outcomes -1, 0 and 1, step rewards 2 in all."""
    return {
        "outcome": kind([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]),
        "step": kind([[1.5, 0.5], [1.5, 0.5], [1.5, 0.5]]),
    }


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_worked_totals(kind: Any) -> None:
    for threshold, totals in (
        (0.0, [-1, 0, 3]),
        (-1.0, [-1, 2, 3]),
        (-math.inf, [1, 2, 3]),
        (math.inf, [-1, 0, 1]),
    ):
        counted = GatedAccumulator([("outcome", Gate(threshold)), ("step", None)])(rewards(kind))
        np.testing.assert_allclose(counted.total, totals)
        np.testing.assert_allclose(counted.per_turn.sum(-1), totals)
    counted = GatedAccumulator([("outcome", Gate(0.0)), ("step", None)])(rewards(kind))
    np.testing.assert_allclose(counted.per_turn, [[0, -1], [0, 0], [1.5, 1.5]])
    np.testing.assert_allclose(counted.opened["step"], [0, 0, 1])


def test_the_gate_judges_the_episode_not_the_turn() -> None:
    early = {"outcome": np.array([[2.0, -3.0]]), "step": np.array([[1.0, 1.0]])}
    counted = GatedAccumulator([("outcome", Gate(0.0)), ("step", None)])(early)
    np.testing.assert_allclose(counted.per_turn, [[2.0, -3.0]])


def test_three_levels() -> None:
    data = {
        "resolved": np.array([[1.0], [1.0], [0.0]]),
        "modified": np.array([[1.0], [0.0], [1.0]]),
        "format": np.array([[0.2], [0.2], [0.2]]),
    }
    levels = [("resolved", Gate(0.0)), ("modified", Gate(0.0)), ("format", None)]
    counted = GatedAccumulator(levels)(data)
    np.testing.assert_allclose(counted.total, [2.2, 1.0, 0.0])
    np.testing.assert_allclose(counted.opened["format"], [1, 0, 0])


def test_only_the_gate_decides_between_nothing_and_everything() -> None:
    rng = np.random.default_rng(0)
    data = {"outcome": rng.normal(size=(2, 4, 5)), "step": rng.normal(size=(2, 4, 5))}
    outcome, step = data["outcome"].sum(-1), data["step"].sum(-1)
    for sharpness in (None, 2.0):
        gate = Gate(0.3, sharpness=sharpness)
        counted = GatedAccumulator([("outcome", gate), ("step", None)])(data)
        assert counted.per_turn.shape == (2, 4, 5)
        np.testing.assert_allclose(counted.total, outcome + gate(outcome) * step)
        np.testing.assert_allclose(counted.per_turn.sum(-1), counted.total)
    failed = {"outcome": np.array([[-1.0, 0.0]]), "step": np.array([[1.0, math.nan]])}
    counted = GatedAccumulator([("outcome", Gate(0.0)), ("step", None)])(failed)
    np.testing.assert_array_equal(counted.per_turn, [[-1.0, 0.0]])
    np.testing.assert_array_equal(counted.total, [-1.0])


def test_gating_moves_the_optimum() -> None:
    # Farming, and finishing: with a plain sum the first is better, with a gate the second.
    data = {"outcome": np.array([[-1.0], [1.0]]), "step": np.array([[7.5], [4.5]])}
    best = [
        int(GatedAccumulator([("outcome", Gate(threshold)), ("step", None)])(data).total.argmax())
        for threshold in (-math.inf, 0.0)
    ]
    assert best == [0, 1]


def test_groups_without_a_gradient() -> None:
    assert dead_groups(np.array([0.0, 0.0, 1.0, 0.0]), 2) == 0.5
    assert dead_groups(torch.zeros(4), 4) == 1.0
    # All outcomes at the gate: step rewards differ, totals do not, and advantages are zero.
    data = {"outcome": np.zeros((4, 1)), "step": np.arange(4.0)[:, None]}
    counted = GatedAccumulator([("outcome", Gate(0.0)), ("step", None)])(data)
    assert dead_groups(counted.total, 4) == 1.0
    np.testing.assert_array_equal(counted.total - counted.total.mean(), 0)
    with pytest.raises(UsageError, match="no whole number of groups"):
        dead_groups(np.zeros(5), 2)


def test_gating_before_squashing_is_not_squashing_before_gating() -> None:
    gates = GatedAccumulator([("outcome", Gate(0.0)), ("step", None)])
    data = {name: torch.tensor(values) for name, values in rewards().items()}
    reference = torch.zeros(3, 1)
    before = par_reward(gates(data).total, reference)
    squashed = {"outcome": data["outcome"], "step": data["step"].clone()}
    squashed["outcome"] = par_reward(data["outcome"].sum(-1), reference)[:, None] * torch.tensor([[0.0, 1.0]])
    after = gates(squashed).total
    np.testing.assert_allclose(before, torch.sigmoid(torch.tensor([-1.0, 0.0, 3.0])))
    # A squashed outcome lies above 0 always: the gate no longer tells failures.
    assert (after > before).all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GatedAccumulator([]), "at least one level"),
        (lambda: GatedAccumulator([("a", Gate()), ("a", None)]), "each once"),
        (lambda: GatedAccumulator([("a", None), ("b", None)]), "the level a has lower ones"),
        (lambda: GatedAccumulator([("a", None)])({}), "have the levels none"),
        (
            lambda: GatedAccumulator([("a", Gate()), ("b", None)])(
                {"a": np.zeros((2, 3)), "b": np.zeros((2, 2))}
            ),
            "all must be the same",
        ),
        (lambda: GatedAccumulator([("a", None)])({"a": np.zeros(())}), "all must be the same"),
    ],
)
def test_what_cannot_be_counted(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make()
