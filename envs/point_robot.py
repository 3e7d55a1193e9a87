"""PointRobot: a unicycle among two hazards whose feasible region can be computed, batched.

FISOR's illustration of feasible regions (Zheng et al. 2024; its code's `env/point_robot.py`). State
(x, y, v, theta) in m, m, m/s, rad; actions (u_0, u_1) in [-1, 1]^2:

    x <- x + v cos(theta) dt    y <- y + v sin(theta) dt    v <- v + u_0 dt    theta <- theta + u_1 dt

all four from the state before the step, dt = 0.05 s. The speed has no bounds: it may become negative.

* reward: the decrease of the distance to the goal (2.2, 2.2), plus 1 on reaching it (distance at most 0.3);
* constraint h = 0.8 - distance to the nearer of the hazards (0.4, -1.2) and (-0.4, 1.2), kept while h <= 0;
  cost 1 where h > 0 (the original's `cost` is 1 where it is kept), and h in `info["constraint"]`;
* the episode terminates at the goal and outside |x|, |y| <= 3, and is truncated after 300 steps.

Observation (11,): x, y, v, cos(theta), sin(theta), and for each hazard its distance and the cosine and sine
of its direction in the robot's frame.
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

__all__ = ["PointRobotEnv", "PointRobotVectorEnv", "advance", "constraint", "escapes", "observe"]

DT = 0.05  # s
EPISODE_STEPS = 300
HAZARDS = np.array([[0.4, -1.2], [-0.4, 1.2]])  # m
HAZARD_RADIUS = 0.8  # m
GOAL = np.array([2.2, 2.2])  # m
GOAL_RADIUS = 0.3  # m
HALF_WIDTH = 3.0  # m
START = np.array([-1.8, 0.0, 2.0, np.pi / 4])
"""Where the original is evaluated: feasible, but not without steering."""
_LOW = np.array([-3.0, -3.0, 0.5, np.pi / 4])
_HIGH = np.array([3.0, 3.0, 2.0, 3 * np.pi / 4])

Floats = NDArray[np.float64]


def advance(states: ArrayLike, actions: ArrayLike) -> Floats:
    """States (..., 4) one step later under actions (..., 2), which are clipped to [-1, 1]."""
    states, actions = np.asarray(states, np.float64), np.clip(np.asarray(actions, np.float64), -1.0, 1.0)
    v, theta = states[..., 2], states[..., 3]
    rates = [v * np.cos(theta), v * np.sin(theta), actions[..., 0], actions[..., 1]]
    result: Floats = states + DT * np.stack(np.broadcast_arrays(*rates), axis=-1)
    return result


def constraint(states: ArrayLike) -> Floats:
    """h (m) of states (..., 4) or positions (..., 2): how deep the robot is in a hazard, negative outside."""
    result: Floats = HAZARD_RADIUS - _hazard_distances(states).min(-1)
    return result


def _hazard_distances(states: ArrayLike) -> Floats:
    offsets = HAZARDS - np.asarray(states, np.float64)[..., None, :2]
    result: Floats = np.linalg.norm(offsets, axis=-1)
    return result


def _goal_distances(states: Floats) -> Floats:
    result: Floats = np.linalg.norm(states[..., :2] - GOAL, axis=-1)
    return result


def observe(states: ArrayLike) -> NDArray[np.float32]:
    """Observations (..., 11) of states (..., 4)."""
    states = np.asarray(states, np.float64)
    cos, sin = np.cos(states[..., 3]), np.sin(states[..., 3])
    parts = [states[..., 0], states[..., 1], states[..., 2], cos, sin]
    for hazard in HAZARDS:
        dx, dy = hazard[0] - states[..., 0], hazard[1] - states[..., 1]
        forward, left = dx * cos + dy * sin, dy * cos - dx * sin
        distance = np.hypot(forward, left)
        # At a hazard's very centre every direction is as good: straight ahead, as atan2(0, 0) has it.
        inside = distance == 0
        scale = np.where(inside, 1.0, distance)
        parts += [distance, np.where(inside, 1.0, forward / scale), left / scale]
    return np.stack(parts, axis=-1).astype(np.float32)


def escapes(states: ArrayLike) -> NDArray[np.bool_]:
    """Whether braking and turning away keeps the robot out of the hazards: states (..., 4) -> (...).

    The original's test of feasibility, hazard by hazard: a robot outside it, whose straight path meets it,
    brakes at full rate and turns at full rate away from its centre until it stands; it must not be within the
    radius after any step. One hazard at a time is looked at, so a robot that swerves from one into the
    other passes, and other manoeuvres are not tried: near the truth, not equal to it.
    """
    states = np.asarray(states, np.float64)
    flat = states.reshape(-1, 4)
    result = np.ones(len(flat), bool)
    for hazard in HAZARDS:
        offset = hazard - flat[:, :2]
        distance = np.linalg.norm(offset, axis=1)
        velocity = flat[:, 2:3] * np.stack([np.cos(flat[:, 3]), np.sin(flat[:, 3])], axis=1)
        speed = np.maximum(np.linalg.norm(velocity, axis=1), 1e-6)
        ahead = (velocity * offset).sum(1) / (speed * np.maximum(distance, 1e-12))
        cross = velocity[:, 0] * offset[:, 1] - velocity[:, 1] * offset[:, 0]
        meets = (ahead > 0) & (distance**2 * (1 - ahead**2) <= HAZARD_RADIUS**2)
        result &= distance > HAZARD_RADIUS
        moving = flat.copy()
        actions = np.stack([np.full(len(flat), -1.0), np.where(cross >= 0, -1.0, 1.0)], axis=1)
        active = meets & (moving[:, 2] > 0)
        while active.any():
            moving[active] = advance(moving[active], actions[active])
            hit = np.linalg.norm(hazard - moving[:, :2], axis=1) <= HAZARD_RADIUS
            result &= ~(active & hit)
            active &= ~hit & (moving[:, 2] > 0)
    return result.reshape(states.shape[:-1])


def _drive(states: Floats, actions: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_], Floats]:
    """One step of N robots: states (N, 4), actions (N, 2) -> new states, rewards, terminations, h."""
    after = advance(states, actions)
    distance = _goal_distances(after)
    arrived = distance <= GOAL_RADIUS
    rewards = _goal_distances(states) - distance + arrived
    return after, rewards, arrived | (np.abs(after[:, :2]) > HALF_WIDTH).any(1), constraint(after)


def _spaces() -> tuple[spaces.Box, spaces.Box]:
    return spaces.Box(-np.inf, np.inf, (11,), np.float32), spaces.Box(-1.0, 1.0, (2,), np.float32)


class PointRobotVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N robots at once, without a loop over environments (for the contract, see `saferl.envs.vector`).

    Args:
        num_envs: number of robots.
        random_start: start uniformly in |x|, |y| <= 3, v in [0.5, 2], theta in [pi/4, 3 pi/4], hazards
            included, as the original's data do, instead of at `START`.

    Each environment draws from its own NumPy generator, `reset(seed=s)` seeding environment i with s + i. The
    state can be stored and restored (see `StatefulVectorEnv`).
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # Gymnasium's declaration
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "cost_names": ("hazards",),
    }

    def __init__(
        self, num_envs: int = 1, random_start: bool = False, max_episode_steps: int = EPISODE_STEPS
    ) -> None:
        if max_episode_steps != EPISODE_STEPS:  # gymnasium.make_vec passes what is registered
            raise UsageError(f"PointRobot's episodes have {EPISODE_STEPS} steps, not {max_episode_steps}")
        self.num_envs = check_num_envs(num_envs)
        self.random_start = random_start
        self.single_observation_space, self.single_action_space = _spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [np.random.default_rng() for _ in range(num_envs)]
        self._states = np.tile(START, (num_envs, 1))
        self._steps = np.zeros(num_envs, np.int64)

    @property
    def states(self) -> Floats:
        """x, y, v and theta of every robot, (N, 4), a copy."""
        return self._states.copy()

    def _restart(self, rows: NDArray[np.intp]) -> None:
        if self.random_start:
            for row in rows:
                self._states[row] = self._generators[row].uniform(_LOW, _HIGH)
        else:
            self._states[rows] = START
        self._steps[rows] = 0

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every episode anew, or those that `options["reset_mask"]` (N,) selects.

        Without a seed the generators go on. Returns the observations (N, 11) of all environments.
        """
        mask, _ = split_reset_mask(options, self.num_envs)
        seeds = expand_seed(seed, self.num_envs)
        rows = np.flatnonzero(mask)
        for row in rows:
            if seeds[row] is not None:
                self._generators[row] = np.random.default_rng(seeds[row])
        self._restart(rows)
        return observe(self._states), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Drive one step with `actions` (N, 2). Raises UsageError for another shape.

        `info["constraint"]` (N,) is h after the step; `info["cost"]` is 1 where it is positive.
        """
        if np.shape(actions) != (self.num_envs, 2):
            raise UsageError(
                f"actions have shape {np.shape(actions)}; this environment takes {(self.num_envs, 2)}"
            )
        self._states, rewards, terminations, signals = _drive(self._states, actions)
        self._steps += 1
        truncations = self._steps >= EPISODE_STEPS
        costs = (signals > 0).astype(np.float64)
        info: dict[str, Any] = {"cost": costs, "costs": {"hazards": costs.copy()}, "constraint": signals}
        obs = observe(self._states)
        ended = terminations | truncations
        if ended.any():
            info["final_obs"], info["_final_obs"] = obs, ended
            self._restart(np.flatnonzero(ended))
            obs = observe(self._states)
        return obs, rewards, terminations, truncations, info

    def get_state(self) -> dict[str, Any]:
        """Return the robots (arrays of shape (N, ...)) and the generators' states (JSON values)."""
        return {
            "states": self._states.copy(),
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
        self._states = np.array(state["states"], np.float64)
        self._steps = np.array(state["steps"], np.int64)
        for generator, stored in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = stored


class PointRobotEnv(gym.Env[np.ndarray, np.ndarray]):
    """One robot: the same numbers as a row of `PointRobotVectorEnv`, in Gymnasium's single interface."""

    metadata: dict[str, Any] = {"render_modes": [], "cost_names": ("hazards",)}  # noqa: RUF012

    def __init__(self, random_start: bool = False) -> None:
        self.observation_space, self.action_space = _spaces()
        self.random_start = random_start
        self._state = START[None].copy()
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; there are no options. The observation has shape (11,)."""
        super().reset(seed=seed)
        self._state = (self.np_random.uniform(_LOW, _HIGH) if self.random_start else START.copy())[None]
        self._steps = 0
        return observe(self._state)[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Drive one step with `action` (2,)."""
        self._state, reward, terminated, signal = _drive(self._state, np.reshape(action, (1, 2)))
        self._steps += 1
        cost = float(signal[0] > 0)
        return (
            observe(self._state)[0],
            float(reward[0]),
            bool(terminated[0]),
            self._steps >= EPISODE_STEPS,
            {"cost": cost, "costs": {"hazards": cost}, "constraint": float(signal[0])},
        )
