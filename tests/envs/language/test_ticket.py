"""Ticket: outcomes and step rewards of written-out episodes, batching, errors."""

from __future__ import annotations

import numpy as np
import pytest

from saferl.envs.language.ticket import EDIT, SUBMIT, TOOL, TicketVectorEnv, describe
from saferl.errors import UsageError


@pytest.mark.parametrize(
    ("actions", "outcome", "step"),
    [
        ([TOOL] * 5, -1, 7.5),
        ([TOOL, TOOL, TOOL, EDIT, SUBMIT], 1, 4.5),
        ([SUBMIT], 0, 0),
        ([EDIT, SUBMIT], 1, 0),
        ([EDIT] * 5, -1, 0),
        ([TOOL] * 4 + [SUBMIT], 0, 6.0),
    ],
)
def test_written_out_episodes(actions: list[int], outcome: float, step: float) -> None:
    env = TicketVectorEnv(2)
    env.reset()
    sums = {"outcome": np.zeros(2), "step": np.zeros(2)}
    total = np.zeros(2)
    for k, action in enumerate(actions):
        obs, rewards, terminations, truncations, info = env.step(np.array([action, action]))
        total += rewards
        for name in sums:
            sums[name] += info["levels"][name]
        assert terminations.all() == (k == len(actions) - 1)
        assert not truncations.any()
    np.testing.assert_array_equal(sums["outcome"], outcome)
    np.testing.assert_array_equal(sums["step"], step)
    np.testing.assert_array_equal(total, outcome + step)
    np.testing.assert_array_equal(info["cost"], float(outcome == -1))
    np.testing.assert_array_equal(obs, 0, "a new ticket is open")
    assert info["final_obs"][0, 0] == len(actions)


def test_tickets_are_apart() -> None:
    env = TicketVectorEnv(3)
    obs, _ = env.reset()
    obs, *_ = env.step(np.array([EDIT, TOOL, SUBMIT]))
    np.testing.assert_array_equal(obs, [[1, 1], [1, 0], [0, 0]])
    obs, _ = env.reset(options={"reset_mask": np.array([True, False, False])})
    np.testing.assert_array_equal(obs, [[0, 0], [1, 0], [0, 0]])


def test_words_and_errors() -> None:
    assert "Turn 2 of 5. The code has been edited." in describe(1, True)
    env = TicketVectorEnv(2)
    env.reset()
    with pytest.raises(UsageError, match="2 numbers from 0 to 2"):
        env.step(np.array([0, 3]))
    with pytest.raises(UsageError, match="2 numbers from 0 to 2"):
        env.step(np.array([0.5, 1.0]))
    with pytest.raises(UsageError, match="2 numbers from 0 to 2"):
        env.step(np.array([0]))
