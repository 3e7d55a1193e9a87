"""What a policy with a memory is told, wherever a policy is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from saferl.cli import video
from saferl.envs.datasets.record import RandomPolicy, record
from saferl.experiment.evaluate import evaluate
from saferl.policies import Stateful

LENGTHS = np.array([2, 3])


class Numbered(VectorEnv[Any, Any, Any]):
    """Environment i ends every LENGTHS[i] steps; rewards and costs count the steps of all time."""

    def __init__(self, num_envs: int = 2) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": 10}
        self.single_observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.clock = 0

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros((self.num_envs, 1), np.float32), {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.clock += 1
        over = self.clock % LENGTHS[: self.num_envs] == 0
        cut = over & (self.clock % 2 == 0)
        obs = np.zeros((self.num_envs, 1), np.float32)
        info = {"cost": 10.0 * self.clock + np.arange(self.num_envs), "final_obs": obs}
        return obs, self.clock + 0.5 * np.arange(self.num_envs), over & ~cut, cut, info

    def render(self) -> Any:
        return (np.full((16, 16, 3), 20 * self.clock, np.uint8),)


class Diary:
    """Zeros, and a list of all that it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def act(self, obs: Any, *, deterministic: bool = False) -> np.ndarray:
        self.calls.append("act")
        return np.zeros((len(obs), 1), np.float32)

    def begin(self, num_envs: int) -> None:
        self.calls.append(("begin", num_envs))

    def observe(self, rewards: Any, costs: Any, ended: Any) -> None:
        self.calls.append((*np.asarray(rewards), *np.asarray(costs), *np.asarray(ended).tolist()))


def expected(steps: int) -> list[Any]:
    calls: list[Any] = [("begin", 2)]
    for t in range(1, steps + 1):
        calls += ["act", (t, t + 0.5, 10 * t, 10 * t + 1, t % 2 == 0, t % 3 == 0)]
    return calls


def test_an_evaluation_tells_of_every_step() -> None:
    diary = Diary()
    assert isinstance(diary, Stateful)
    evaluate(diary, Numbered(), 4)
    assert diary.calls == expected(6)


def test_a_recording_tells_of_every_step() -> None:
    diary = Diary()
    record(diary, Numbered(), 4)
    assert diary.calls == expected(6)


def test_a_film_tells_of_every_step(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    diary = Diary()
    video.record(tmp_path / "film.gif", lambda: Numbered(1), diary, quiet=True)
    assert diary.calls == [("begin", 1), "act", (1, 10, False), "act", (2, 20, True)]


def test_one_without_a_memory_is_not_stateful() -> None:
    policy = RandomPolicy(spaces.Box(-1, 1, (1,), np.float32))
    assert not isinstance(policy, Stateful)
    assert len(evaluate(policy, Numbered(), 4).returns) == 4
