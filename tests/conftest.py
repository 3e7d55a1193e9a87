"""Shared fixtures: one torch thread, and small faulty environments."""

from __future__ import annotations

import signal
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    # A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Faulty(gym.Env[np.ndarray, np.ndarray]):
    """Turns the named quantity into NaN from step 25 of its life on."""

    def __init__(self, fault: str = "", value: float = float("nan")) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.fault, self.value, self.steps = fault, value, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        broken = self.steps >= 25
        obs = self.np_random.normal(size=2).astype(np.float32)
        reward, cost = float(action[0]), 1.0
        if broken and self.fault == "observation":
            obs[1] = self.value
        if broken and self.fault == "reward":
            reward = self.value
        if broken and self.fault == "cost":
            cost = self.value
        if broken and self.fault == "crash":
            raise RuntimeError("the simulator fell over")
        return obs, reward, False, self.steps % 10 == 0, {"cost": cost}


class DictDiscrete(gym.Env[dict[str, Any], Any]):
    """A contextual choice: the right arm is shown in a Dict observation; the wrong one costs."""

    metadata: dict[str, Any] = {"cost_names": ("wrong", "right")}  # noqa: RUF012

    def __init__(self, action: str = "discrete") -> None:
        self.observation_space = spaces.Dict(
            {"arm": spaces.Discrete(3), "noise": spaces.Box(-10, 10, (2,), np.float64)}
        )
        self.action_space = spaces.Discrete(3) if action == "discrete" else spaces.MultiDiscrete([3, 2])

    def _observe(self) -> dict[str, Any]:
        self.arm = int(self.np_random.integers(3))
        return {"arm": np.int64(self.arm), "noise": self.np_random.uniform(-1, 1, 2)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        right = int(np.asarray(action).reshape(-1)[0]) == self.arm
        costs = {"wrong": float(not right), "right": float(right)}
        return self._observe(), float(right), self.steps == 8, False, {"cost": costs["wrong"], "costs": costs}


for _name, _class in (("Faulty", Faulty), ("DictDiscrete", DictDiscrete)):
    if f"saferl-test/{_name}-v0" not in gym.registry:
        gym.register(f"saferl-test/{_name}-v0", entry_point=_class)
for _fault in ("observation", "reward", "cost", "crash"):
    if f"saferl-test/Faulty-{_fault}-v0" not in gym.registry:
        gym.register(f"saferl-test/Faulty-{_fault}-v0", entry_point=Faulty, kwargs={"fault": _fault})
if "saferl-test/MultiDiscrete-v0" not in gym.registry:
    gym.register("saferl-test/MultiDiscrete-v0", entry_point=DictDiscrete, kwargs={"action": "multi"})
