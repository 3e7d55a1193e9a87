"""Recording: every transition of the first episodes of each environment, in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from saferl.envs import make_vec
from saferl.envs.datasets.record import RandomPolicy, record
from saferl.envs.point_robot import PointRobotVectorEnv
from saferl.errors import DatasetError, UsageError


class Steer:
    """Actions that depend on nothing but the observation."""

    def act(self, obs: Any, *, deterministic: bool = False) -> np.ndarray:
        return np.tanh(obs[:, :2] * 3)


def test_episodes_are_whole_and_in_order() -> None:
    data = record(Steer(), PointRobotVectorEnv(3, random_start=True), 7, seed=5)
    assert (data.num_episodes, data.trailing) == (7, 0)
    # Environment i starts from seed + i; its episodes follow one another.
    first = PointRobotVectorEnv(1, random_start=True)
    obs, _ = first.reset(seed=5)
    returns, total, cost, rows = [], 0.0, 0.0, 0
    while len(returns) < 3:
        np.testing.assert_array_equal(data.observations[rows], obs[0])
        actions = Steer().act(obs)
        obs, reward, terminated, truncated, info = first.step(actions)
        np.testing.assert_allclose(data.actions[rows], actions[0])
        final = info.get("final_obs", obs)
        np.testing.assert_array_equal(data.next_observations[rows], final[0])
        assert (data.terminals[rows], data.timeouts[rows]) == (
            terminated[0],
            truncated[0] and not terminated[0],
        )
        total, cost, rows = total + reward[0], cost + info["cost"][0], rows + 1
        if terminated[0] or truncated[0]:
            returns.append((total, cost))
            total = cost = 0.0
    np.testing.assert_allclose(data.episode_returns[:3], [r for r, _ in returns], rtol=1e-5)
    np.testing.assert_allclose(data.episode_costs[:3], [c for _, c in returns])


def test_time_limits_are_timeouts() -> None:
    env = make_vec("SpeedLimit-v0", 2)
    data = record(RandomPolicy(env.single_action_space), env, 3)
    assert data.timeouts.sum() + data.terminals.sum() == 3
    np.testing.assert_array_equal(data.timeouts[data.ends], data.episode_lengths == 100)
    assert data.actions.shape[1] == 1


def test_what_cannot_be_recorded() -> None:
    env = make_vec("SpeedLimit-v0", 2)
    with pytest.raises(UsageError, match="at least one"):
        record(Steer(), env, 0)

    class Broken:
        def act(self, obs: Any, *, deterministic: bool = False) -> np.ndarray:
            return np.full((2, 1), np.nan)

    with pytest.raises(DatasetError, match="cannot be kept"):
        record(Broken(), env, 2)
