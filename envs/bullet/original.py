"""Bullet-Safety-Gym's own tasks in Gymnasium's interface, with the step's cost in `info["cost"]`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from saferl.envs.bullet import compat, tasks
from saferl.errors import UsageError, unknown_name

__all__ = ["BulletEnv"]

_TASKS = {task.id: task for task in tasks()}


class BulletEnv(gym.Env[np.ndarray, np.ndarray]):
    """A task of bullet-safety-gym 1.4.0, computed by that package (see `compat`) in a simulation of its own.

    Observations, rewards and costs are the package's, bit for bit. Run: move along x; Circle: move around
    the origin, best at a distance of 7.

    * Observation: a flat vector, float64: the robot's state, scaled (Ball, Car: 7 numbers, Drone 17, Ant 33),
      and in Circle tasks the distance from the circle.
    * Action: in [-1, 1], to which the package clips it: the Ball's force along x and y; the Car's wheel speed
      and steering angle; the speeds of the Drone's four rotors about hovering; the torques of the Ant's eight
      joints.
    * Reward: the package's, a float. Run: 60 times the progress towards (1000, 0) plus the robot's own
      reward (for being alive, against effort and spinning). Circle: the tangential velocity times the
      distance from the origin, less off the circle.
    * Cost: `info["cost"]` is 1.0 in a step that violates any constraint, else 0.0, and `info["costs"]` says
      which (each 0.0 or 1.0): "outside_bounds", |y| > 2 in Run and |x| > 6 in Circle, and in Run
      "velocity_violation", a speed above 1.5 (Ball: 2.5).
    * An episode ends when the Ant's torso touches the ground or the Drone turns over, and by Gymnasium's time
      limit, so make these with `gymnasium.make` or `make_vec`.

    As in the package, the motors of a Car and a Drone keep their last command when an episode begins, for
    the one physics step that a reset takes.

    Args:
        task_id: the package's id, for example "SafetyBallRun-v0".
        render_mode: None or "rgb_array" (360, 480, 3, uint8), drawn by PyBullet on the processor.

    Raises MissingPackageError when bullet-safety-gym or PyBullet is not installed and UsageError for an
    impossible argument.

    Source: Gronauer, "Bullet-Safety-Gym: A Framework for Constrained Reinforcement Learning", 2022.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, task_id: str, *, render_mode: str | None = None) -> None:
        if task_id not in _TASKS:
            raise unknown_name("Bullet task", task_id, list(_TASKS))
        if render_mode not in (None, "rgb_array"):
            raise UsageError(f"render_mode is {render_mode!r}; this environment has 'rgb_array'")
        self.render_mode = render_mode
        self._task = _TASKS[task_id]
        self._generator = np.random.RandomState(np.random.SeedSequence().generate_state(1)[0])
        self._env = self._make()
        self._untouched = True
        self.observation_space = self._env.observation_space
        self.action_space = self._env.action_space
        self._cost_names: tuple[str, ...] = ("outside_bounds",)
        if self._task.task == "RunTask":
            self._cost_names += ("velocity_violation",)
        self.metadata = {
            **type(self).metadata,
            "render_fps": round(1 / self._env.dt),
            "cost_names": self._cost_names,
        }

    def _make(self) -> Any:
        with compat.draws_from(self._generator):
            return compat.make(self._task, visuals=self.render_mode is not None)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Place the robot anew. No options.

        A seed (taken modulo 2**32) decides the place and all that follow: the numbers are those that the
        package draws after `numpy.random.seed(seed)`, in a simulation made anew, so that nothing of what
        came before is left.
        """
        super().reset(seed=seed)
        if seed is not None:
            if not self._untouched:
                self._env.close()
                self._env = self._make()
            self._generator = np.random.RandomState(seed % 2**32)
        self._untouched = False
        with compat.draws_from(self._generator):
            obs, _ = self._env.reset()
        return obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step with `action`, an array of the action space's shape."""
        obs, reward, terminated, truncated, info = self._env.step(np.asarray(action))
        costs = {name: float(info.get(f"cost_{name}", 0.0)) for name in self._cost_names}
        info = {"cost": float(info["cost"]), "costs": costs}
        return obs, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> np.ndarray:
        """Return a frame, without the red sphere about a robot that violates a constraint.

        Without a window PyBullet draws all that it draws opaque, and the sphere would hide the robot.
        """
        if self.render_mode is None:
            raise UsageError("this environment was made without render_mode; pass render_mode='rgb_array'")
        sphere = self._env.agent.violation_body_id  # collides with nothing; every step moves it to the robot
        self._env.bc.resetBasePositionAndOrientation(sphere, [0.0, 0.0, -1000.0], [0.0, 0.0, 0.0, 1.0])
        frame: np.ndarray = self._env.render("rgb_array").astype(np.uint8)
        return frame

    def close(self) -> None:
        """End the simulation."""
        self._env.close()
