"""Safety-Gymnasium's own tasks in Gymnasium's interface, with the step's cost in `info["cost"]`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from saferl.envs.safety_gym import compat
from saferl.errors import SaferlError, UsageError

__all__ = ["SafetyGymEnv"]

#: The costs an obstacle class reports, without the package's prefix "cost_".
_PARTS = {
    "buttons": ("buttons",),
    "gremlins": ("gremlins",),
    "hazards": ("hazards",),
    "pillars": ("pillars",),
    "sigwalls": ("out_of_boundary",),
    "vases": ("vases_contact", "vases_velocity"),
}


class SafetyGymEnv(gym.Env[Any, np.ndarray]):
    """A task of safety-gymnasium 1.0.0, computed by that package (see `compat`).

    Layouts, observations, rewards and costs are the package's; the differences are the interface and
    that resets leave out the textures, which take most of their time, unless something is rendered.

    * Observation: the package's flat vector, float64, sensors first, then a 16-bin lidar an observed kind
      of object. `observation="dict"` gives the parts by name instead (navigation tasks only).
    * Action: the package's box; navigation tasks clip to it.
    * Reward: the package's, a float; `info["goal_met"]` is True in the step that reaches a goal.
    * Cost: `info["cost"]` is 1.0 in a step that violates any constraint, else 0.0, and `info["costs"]` says
      which (each 0.0 or 1.0, all names of `metadata["cost_names"]` at every step). Tasks of level 0
      other than Run have the single name "cost" and never a cost.
    * The navigation tasks end by themselves after 1000 steps (Circle, Run: 500); the velocity tasks by
      Gymnasium's time limit, so make them with `gymnasium.make` or `make_vec`.

    Args:
        task_id: the package's id, for example "SafetyPointGoal1-v0" or "SafetyAntVelocity-v1".
        render_mode: None, "rgb_array" (height, width, 3, uint8) or "depth_array" (height, width,
            float32); both need an offscreen OpenGL.
        width, height: of a frame, in pixels.
        camera_id, camera_name: the camera, at most one of the two. Navigation tasks have "vision" (the
            default), "track", "fixednear" and "fixedfar".
        observation: "flat" or "dict".

    Raises MissingPackageError when safety-gymnasium is not installed and UsageError for an impossible
    argument.

    Source: Ji et al., "Safety-Gymnasium: A Unified Safe Reinforcement Learning Benchmark", 2023.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "depth_array"]}  # noqa: RUF012

    def __init__(
        self,
        task_id: str,
        *,
        render_mode: str | None = None,
        width: int = 256,
        height: int = 256,
        camera_id: int | None = None,
        camera_name: str | None = None,
        observation: str = "flat",
        _textures: bool | None = None,  # for the benchmark: compile textures as the package does
    ) -> None:
        if render_mode not in (None, "rgb_array", "depth_array"):
            raise UsageError(
                f"render_mode is {render_mode!r}; this environment has 'rgb_array', 'depth_array'"
            )
        if observation not in ("flat", "dict"):
            raise UsageError(f"observation is {observation!r}; choose 'flat' or 'dict'")
        velocity = task_id.partition("-")[0].endswith("Velocity")
        if velocity and observation == "dict":
            raise UsageError(
                f"{task_id} observes a plain vector; only navigation tasks have observation='dict'"
            )
        self.task_id = task_id
        self.render_mode = render_mode
        self._keep_textures = render_mode is not None if _textures is None else _textures
        config = {} if velocity else {"config": {"observation_flatten": observation == "flat"}}
        self._env = compat.make(
            task_id,
            render_mode=render_mode,
            width=width,
            height=height,
            camera_id=camera_id,
            camera_name=camera_name,
            **config,
        )
        self.observation_space = self._env.observation_space
        self.action_space = self._env.action_space
        self._task = None if velocity else self._env.task
        self._cost_names = ("velocity",) if velocity else _navigation_costs(self._task)
        self.metadata = {
            **type(self).metadata,
            "render_fps": self._env.metadata["render_fps"],
            "cost_names": self._cost_names,
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Draw a new layout; a seed (taken modulo 2**32) decides it and all that follow. No options."""
        super().reset(seed=seed)
        with compat.textures(self._keep_textures):
            obs, _ = self._env.reset(seed=None if seed is None else seed % 2**32)
        return obs, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step with `action`, an array of the action space's shape."""
        obs, reward, cost, terminated, truncated, info = self._env.step(np.asarray(action))
        if self._task is None:
            costs = {"velocity": float(cost)}
            info = dict(info)
        else:
            # Buttons report no cost while their timer runs, and level 0 none at all.
            costs = {name: float(info.get(f"cost_{name}", 0.0)) for name in self._cost_names}
            info = {"goal_met": bool(info.get("goal_met", False))}
        info["cost"] = float(cost)
        info["costs"] = costs
        return obs, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """Return a frame. Raises SaferlError when no offscreen OpenGL is available."""
        if self.render_mode is None:
            raise UsageError("this environment was made without render_mode; pass render_mode='rgb_array'")
        try:
            return self._env.render()
        except Exception as error:  # whatever the OpenGL library raises
            raise SaferlError(
                f"rendering failed ({error}); without a display, install EGL or OSMesa and set "
                "MUJOCO_GL=egl or MUJOCO_GL=osmesa in the environment"
            ) from error

    def close(self) -> None:
        """Free the renderer."""
        if self._task is None:
            self._env.close()
            return
        while self._task._viewers:
            self._task._viewers.popitem()
        self._task.viewer = None


def _navigation_costs(task: Any) -> tuple[str, ...]:
    constrained = [obstacle.name for obstacle in task._obstacles if obstacle.is_constrained]
    return tuple(part for name in constrained for part in _PARTS[name]) or ("cost",)
