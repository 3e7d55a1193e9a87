"""SpeedLimit: a fast, deterministic, batched driving toy with a known constrained optimum.

A car on a straight road starts at a random speed v0 ~ U(0.3, 0.7) m/s and chooses its throttle a in
[-1, 1] for T = 100 steps of dt = 0.1 s:

    v <- clip(v + a_max a dt, 0, v_max)        a_max = 1 m/s^2, v_max = 2 m/s
    reward           r = v dt                  the distance driven in the step, m
    cost "speed"     c = max(0, v - v_limit)   v_limit = 1 m/s
    cost "throttle"  c = a^2

with the speed after the step in all three. The episode is truncated after T steps and terminates when
the car stalls (v = 0), which no good driver lets happen.

**Known optimum.** Let v_t = min(v0 + 0.1 t, v_max), t = 1..T, be full throttle. Under the limit L on an
episode's speed cost, every policy obeys

    return = dt sum_t v = dt (sum_t min(v, v_limit) + sum_t max(0, v - v_limit))
          <= dt (sum_t min(v_t, v_limit) + min(L, L_full)),    L_full = sum_t max(0, v_t - v_limit),

and the bound is attained: full throttle up to the limit, then the allowance L spent at any time (see
`optimal_return`). For v0 = 0.5 m/s this is 9.9 + L / 10, up to 18.95 at L_full = 90.5; the mean over v0 is
less than 0.01 lower. So a learner without constraint costs about 90, one with L = 25 returns about
12.4, one with L = 0 about 9.9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from saferl.envs.vector import check_num_envs, expand_seed, split_reset_mask
from saferl.errors import UsageError

__all__ = ["COST_NAMES", "EPISODE_STEPS", "SpeedLimitEnv", "SpeedLimitVectorEnv", "optimal_return"]

DT = 0.1  # s
ACCELERATION = 1.0  # m/s^2 at full throttle
TOP_SPEED = 2.0  # m/s
SPEED_LIMIT = 1.0  # m/s
START_SPEED = (0.3, 0.7)  # m/s
EPISODE_STEPS = 100
COST_NAMES = ("speed", "throttle")

_ROAD = SPEED_LIMIT * DT * EPISODE_STEPS  # m, the distance driven at the limit; unit of the observation

Floats = NDArray[np.float64]


def optimal_return(start_speed: ArrayLike, cost_limit: float = np.inf) -> Floats:
    """Return the largest return (m) of an episode whose speed cost is at most `cost_limit`.

    `start_speed` in m/s has any shape, which the result shares; infinity means no limit. Raises
    UsageError for a negative limit.
    """
    if cost_limit < 0:
        raise UsageError(f"cost_limit is {cost_limit}; the speed cost is never below 0")
    start = np.asarray(start_speed, dtype=np.float64)[..., None]
    fastest = np.minimum(start + ACCELERATION * DT * np.arange(1, EPISODE_STEPS + 1), TOP_SPEED)
    excess = np.maximum(0.0, fastest - SPEED_LIMIT).sum(-1)
    best: Floats = DT * (np.minimum(fastest, SPEED_LIMIT).sum(-1) + np.minimum(cost_limit, excess))
    return best


def _spaces() -> tuple[spaces.Box, spaces.Box]:
    high = np.array([TOP_SPEED, 1.0, TOP_SPEED / SPEED_LIMIT], np.float32)
    return spaces.Box(np.zeros(3, np.float32), high), spaces.Box(-1.0, 1.0, (1,), np.float32)


def _advance(speed: Floats, actions: ArrayLike) -> tuple[Floats, Floats, Floats, Floats]:
    """One step of N cars: `speed` (N,), `actions` (N, 1) -> new speed, reward, the two costs, each (N,)."""
    throttle = np.clip(np.asarray(actions, np.float64)[:, 0], -1.0, 1.0)
    speed = np.clip(speed + ACCELERATION * DT * throttle, 0.0, TOP_SPEED)
    return speed, speed * DT, np.maximum(0.0, speed - SPEED_LIMIT), throttle * throttle


def _observe(speed: Floats, steps: NDArray[np.int64], distance: Floats) -> NDArray[np.float32]:
    return np.stack([speed, 1.0 - steps / EPISODE_STEPS, distance / _ROAD], axis=1).astype(np.float32)


class SpeedLimitVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N cars at once, without a loop over environments (for the contract, see `saferl.envs.vector`).

    Observation (N, 3) float32: speed in m/s, share of the episode left, distance driven in units of the
    10 m that the limit allows. Action (N, 1): throttle, clipped to [-1, 1]. `info["cost"]` is the speed
    cost, the one that `optimal_return` limits; `info["costs"]` has "speed" and "throttle".

    Each environment draws from its own NumPy generator, `reset(seed=s)` seeding environment i with s + i,
    so that N environments equal N separate ones. The state can be stored and restored (see
    `StatefulVectorEnv`).
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # Gymnasium's declaration
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "cost_names": COST_NAMES,
    }

    def __init__(self, num_envs: int = 1, max_episode_steps: int = EPISODE_STEPS) -> None:
        if max_episode_steps != EPISODE_STEPS:  # gymnasium.make_vec passes what is registered
            raise UsageError(f"SpeedLimit's episodes have {EPISODE_STEPS} steps, not {max_episode_steps}")
        self.num_envs = check_num_envs(num_envs)
        self.single_observation_space, self.single_action_space = _spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [np.random.default_rng() for _ in range(num_envs)]
        self._speed = np.zeros(num_envs)
        self._distance = np.zeros(num_envs)
        self._steps = np.zeros(num_envs, np.int64)

    def _restart(self, rows: NDArray[np.intp]) -> None:
        self._speed[rows] = [self._generators[row].uniform(*START_SPEED) for row in rows]
        self._distance[rows] = 0.0
        self._steps[rows] = 0

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every episode anew, or those that `options["reset_mask"]` (N,) selects.

        Without a seed the generators go on. Returns the observations (N, 3) of all environments.
        """
        mask, _ = split_reset_mask(options, self.num_envs)
        seeds = expand_seed(seed, self.num_envs)
        rows = np.flatnonzero(mask)
        for row in rows:
            if seeds[row] is not None:
                self._generators[row] = np.random.default_rng(seeds[row])
        self._restart(rows)
        return _observe(self._speed, self._steps, self._distance), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Drive one step with `actions` (N, 1). Raises UsageError for another shape."""
        if np.shape(actions) != (self.num_envs, 1):
            raise UsageError(
                f"actions have shape {np.shape(actions)}; this environment takes {(self.num_envs, 1)}"
            )
        self._speed, rewards, excess, effort = _advance(self._speed, actions)
        self._distance += rewards
        self._steps += 1
        terminations = self._speed <= 0.0
        truncations = self._steps >= EPISODE_STEPS
        obs = _observe(self._speed, self._steps, self._distance)
        info: dict[str, Any] = {"cost": excess.copy(), "costs": {"speed": excess, "throttle": effort}}
        ended = terminations | truncations
        if ended.any():
            info["final_obs"], info["_final_obs"] = obs, ended
            self._restart(np.flatnonzero(ended))
            obs = _observe(self._speed, self._steps, self._distance)
        return obs, rewards, terminations, truncations, info

    def get_state(self) -> dict[str, Any]:
        """Return the cars (arrays of shape (N,)) and the generators' states (JSON values)."""
        return {
            "speed": self._speed.copy(),
            "distance": self._distance.copy(),
            "steps": self._steps.copy(),
            "generators": [generator.bit_generator.state for generator in self._generators],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`'s result; UsageError when it is of another number of environments."""
        if len(state["generators"]) != self.num_envs:
            raise UsageError(
                f"the stored state has {len(state['generators'])} environments, this one {self.num_envs}; "
                "make the environment with the same number"
            )
        self._speed = np.array(state["speed"], np.float64)
        self._distance = np.array(state["distance"], np.float64)
        self._steps = np.array(state["steps"], np.int64)
        for generator, stored in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = stored


class SpeedLimitEnv(gym.Env[np.ndarray, np.ndarray]):
    """One car: the same numbers as a row of `SpeedLimitVectorEnv`, in Gymnasium's single interface."""

    metadata: dict[str, Any] = {"render_modes": [], "cost_names": COST_NAMES}  # noqa: RUF012

    def __init__(self) -> None:
        self.observation_space, self.action_space = _spaces()
        self._speed = np.zeros(1)
        self._distance = np.zeros(1)
        self._steps = np.zeros(1, np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; there are no options. The observation has shape (3,)."""
        super().reset(seed=seed)
        self._speed = np.array([self.np_random.uniform(*START_SPEED)])
        self._distance = np.zeros(1)
        self._steps = np.zeros(1, np.int64)
        return _observe(self._speed, self._steps, self._distance)[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Drive one step with `action` (1,)."""
        self._speed, reward, excess, effort = _advance(self._speed, np.reshape(action, (1, 1)))
        self._distance += reward
        self._steps += 1
        costs = {"speed": float(excess[0]), "throttle": float(effort[0])}
        return (
            _observe(self._speed, self._steps, self._distance)[0],
            float(reward[0]),
            bool(self._speed[0] <= 0.0),
            bool(self._steps[0] >= EPISODE_STEPS),
            {"cost": costs["speed"], "costs": costs},
        )
