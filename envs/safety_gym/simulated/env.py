"""The vector environment of the batched MuJoCo engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from saferl.envs import safety_gym
from saferl.envs.safety_gym.simulated.engine import Engine, available_cores
from saferl.envs.vector import check_num_envs, expand_seed, split_reset_mask
from saferl.errors import SaferlError, UsageError, unknown_name

__all__ = ["SimulatedVectorEnv"]


class SimulatedVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N environments of a Safety-Gymnasium task on MuJoCo (for the contract, see `saferl.envs.vector`).

    Layouts, observations, rewards, costs and endings are those of the original package on the same MuJoCo,
    bit for bit (`SafetyGymEnv`, which see for the spaces), with one exception: a Point or Car lets vases,
    gremlins and push boxes out of its reach follow their known course without simulating them. That changes
    roundings, about 1e-14 a step (for Points nothing, until they touch one of those).

    `info` has, besides the costs, "goal_met" (N,) bool for navigation tasks, and the velocity tasks' entries
    ("x_velocity" and so on), all of the step just taken; `info["final_info"]` repeats those of the rows
    whose episode ended.

    Args:
        task_id: the package's id, for example "SafetyCarGoal2-v0" or "SafetyAntVelocity-v1".
        num_envs: number of environments N.
        threads: threads that share the environments; 0 is one for every core available to this process.
            Their number does not change any result.
        max_episode_steps: steps after which an episode is truncated (the task's own limit holds as well).
        exact: simulate everything at every step, for the original's bits in all tasks, at up to twenty
            times the price.

    Raises UsageError for an unknown task or impossible numbers, MissingPackageError when safety-gymnasium is
    not installed.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        task_id: str,
        num_envs: int = 1,
        *,
        threads: int = 0,
        max_episode_steps: int | None = None,
        exact: bool = False,
    ) -> None:
        self.closed = True  # until there is something to close
        known = {task.id: task for task in safety_gym.tasks()}
        if task_id not in known:
            raise unknown_name("simulated task", task_id, known)
        if threads < 0:
            raise UsageError(f"threads is {threads}; 0 means one for every core")
        if max_episode_steps is not None and max_episode_steps < 1:
            raise UsageError(f"max_episode_steps is {max_episode_steps}; an episode has at least one step")
        self.task_id = task_id
        self.num_envs = check_num_envs(num_envs)
        self._engine = engine = _engine(task_id, num_envs, threads or available_cores(), exact)
        own = known[task_id].max_episode_steps
        self._max_steps = own if max_episode_steps is None else max_episode_steps
        if not task_id.partition("-")[0].endswith("Velocity"):  # those have no limit of their own
            self._max_steps = min(self._max_steps, own)
        self.metadata = {
            **type(self).metadata,
            "backend": "simulated",
            "cost_names": engine.cost_names,
            "render_fps": engine.render_fps,
        }
        self.single_observation_space = engine.observation_space
        self.single_action_space = engine.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._steps = np.zeros(num_envs, np.int64)
        self._started = np.zeros(num_envs, bool)
        self.closed = False

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes: of all environments, or of those that `options["reset_mask"]` (N,) selects.

        A seed restarts the random numbers of an environment that is reset, else they go on. Returns the
        observations of all environments, those not selected as they were, and no infos.
        """
        self._check_open()
        mask, _ = split_reset_mask(options, self.num_envs)
        for row, row_seed in enumerate(expand_seed(seed, self.num_envs)):
            if mask[row]:
                self._engine.seed(row, row_seed)
        self._restart(mask)
        return self._engine.obs.copy(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one control step with `actions` (N, A).

        Raises UsageError for another shape, or before every environment was reset.
        """
        self._check_open()
        if not self._started.all():
            raise UsageError("an environment has no episode yet; call reset before step")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise UsageError(
                f"actions have shape {actions.shape}; this environment takes {self.action_space.shape}"
            )
        outcome = self._engine.step(actions)
        self._steps += 1
        truncated = self._steps >= self._max_steps
        info: dict[str, Any] = {**outcome.extras, "cost": outcome.cost, "costs": outcome.costs}
        ended = outcome.terminated | truncated
        if ended.any():
            info["final_obs"], info["_final_obs"] = self._engine.obs.copy(), ended
            info["final_info"] = _final(outcome.extras, ended)
            self._restart(ended)
        return self._engine.obs.copy(), outcome.rewards, outcome.terminated, truncated, info

    def get_state(self) -> dict[str, Any]:
        """Return everything that the future depends on: arrays of N rows, and JSON values."""
        self._check_open()
        return {
            "task": self.task_id,
            "steps": self._steps.copy(),
            "started": self._started.copy(),
            **self._engine.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`'s result; UsageError when it is of another task or number."""
        self._check_open()
        stored = len(state["steps"])
        if state["task"] != self.task_id or stored != self.num_envs:
            raise UsageError(
                f"the stored state has {stored} environments of {state['task']}, this one {self.num_envs} "
                f"of {self.task_id}; make the same environment with the same number"
            )
        self._steps[:], self._started[:] = state["steps"], state["started"]
        self._engine.set_state(state)

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._engine.close()

    def _restart(self, mask: np.ndarray) -> None:
        self._engine.restart(mask)
        self._steps[mask] = 0
        self._started |= mask

    def _check_open(self) -> None:
        if self.closed:
            raise SaferlError("this vector environment is closed; make a new one")


def _engine(task_id: str, num_envs: int, threads: int, exact: bool) -> Engine:
    # These import MuJoCo and numba.
    if task_id.partition("-")[0].endswith("Velocity"):
        from saferl.envs.safety_gym.simulated.velocity import Velocity

        return Velocity(task_id, num_envs, threads)
    from saferl.envs.safety_gym.simulated.navigation import Navigation

    return Navigation(task_id, num_envs, threads, exact)


def _final(extras: Mapping[str, np.ndarray], ended: np.ndarray) -> dict[str, np.ndarray]:
    """Gymnasium's form of the finished episodes' infos: values, and a mask a name."""
    return {**extras, **{f"_{name}": ended.copy() for name in extras}}
